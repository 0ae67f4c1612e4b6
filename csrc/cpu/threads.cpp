#include "threads.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

namespace fused_optim {
namespace {

constexpr int64_t kPieceChunks = 16;
constexpr std::memory_order kRelaxed = std::memory_order_relaxed;

// The pieces that each thread still has: first and end in one word, so that owner and thieves change both atomically.
// The word is the whole state of a share, so a compare-exchange is correct even if the word changed and changed back.
class Shares {
 public:
  Shares(int64_t pieces, int threads, Order order)
      : pieces_(pieces), threads_(threads), order_(order), shares_(threads) {
    for (int64_t i = 0; i < threads; ++i) shares_[i].left = pack(begin_of(i), begin_of(i + 1));
  }

  // The next piece for a thread, or -1 if all are taken.
  int64_t take(int thread) {
    std::atomic<uint64_t>& own = shares_[thread].left;
    uint64_t left = own.load(kRelaxed);
    while (first(left) < end(left)) {
      if (own.compare_exchange_weak(left, pack(first(left) + 1, end(left)), kRelaxed)) return place(first(left));
    }
    return steal(own);
  }

 private:
  struct alignas(64) Share {  // one cache line per share
    std::atomic<uint64_t> left;
  };

  static uint64_t pack(int64_t first, int64_t end) { return static_cast<uint64_t>(first << 32 | end); }
  static int64_t first(uint64_t left) { return static_cast<int64_t>(left >> 32); }
  static int64_t end(uint64_t left) { return static_cast<int64_t>(left & 0xffffffff); }

  int64_t steal(std::atomic<uint64_t>& own) {
    while (true) {
      std::atomic<uint64_t>* slowest = nullptr;
      uint64_t most = 0;
      for (Share& share : shares_) {
        const uint64_t left = share.left.load(kRelaxed);
        if (end(left) - first(left) > end(most) - first(most)) slowest = &share.left, most = left;
      }
      if (slowest == nullptr) return -1;
      const int64_t middle = first(most) + (end(most) - first(most)) / 2;
      if (!slowest->compare_exchange_strong(most, pack(first(most), middle), kRelaxed)) continue;
      own.store(pack(middle + 1, end(most)), kRelaxed);
      return place(middle);
    }
  }

  // For kBackward the pieces are mirrored within each thread's initial share.
  int64_t place(int64_t piece) const {
    if (order_ == Order::kForward) return piece;
    const int64_t share = ((piece + 1) * threads_ - 1) / pieces_;
    return begin_of(share) + begin_of(share + 1) - 1 - piece;
  }

  int64_t begin_of(int64_t share) const { return share * pieces_ / threads_; }

  const int64_t pieces_, threads_;
  const Order order_;
  std::vector<Share> shares_;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Decides whether a pass uses the other threads, from the times that the calling thread had to wait for them. If
// another process keeps a core busy, a thread begins one or two time slices late. This is many times what the thread
// saves in a small pass, and an OpenMP region ends only with its last thread. So after a late end the calling thread
// works alone until this has cost as much as the wait. Each further late end doubles that limit, and ends in time
// reduce it again. Each compiled module has one instance. Times are in seconds.
class Lateness {
 public:
  bool alone(int64_t pieces, int threads) const {
    return debt_.load(kRelaxed) > 0.0 && saved(pieces, threads) < waited_.load(kRelaxed);
  }

  void went_alone(int64_t pieces, int threads, double seconds) {
    piece_.store(seconds / static_cast<double>(pieces), kRelaxed);
    debt_.store(debt_.load(kRelaxed) - saved(pieces, threads), kRelaxed);
  }

  // The calling thread did `own` of the pieces in `seconds` and then waited for the others.
  void went_together(int64_t pieces, int threads, int64_t own, double seconds, double waited) {
    if (own > 0) piece_.store(seconds / static_cast<double>(own), kRelaxed);
    const bool late = waited > saved(pieces, threads);
    const double last = patience_.load(kRelaxed);
    if (late) patience_.store(std::min(2.0 * last, kMostPatience), kRelaxed);
    else if (debt_.load(kRelaxed) <= 0.0) patience_.store(std::max(0.9 * last, kLeastPatience), kRelaxed);
    if (late) debt_.store(patience_.load(kRelaxed) * waited, kRelaxed);
    waited_.store(waited, kRelaxed);
  }

 private:
  static constexpr double kLeastPatience = 0.5, kMostPatience = 16.0;

  // The time that all threads together save, estimated from the last time per piece.
  double saved(int64_t pieces, int threads) const {
    return piece_.load(kRelaxed) * static_cast<double>(pieces) * (threads - 1) / threads;
  }

  std::atomic<double> piece_{0.0}, waited_{0.0}, debt_{0.0}, patience_{kLeastPatience};
};

Lateness lateness;

}  // namespace

int threads_for(int64_t elements, int64_t chunks, int most) {
  return elements + 64 * chunks < 32768 ? 1 : most;  // the overhead of a chunk is about the time of 64 elements
}

int64_t chunks_per_piece(int64_t chunks, int threads) {
  return std::clamp<int64_t>(chunks / (int64_t{threads} * 32), 1, kPieceChunks);
}

void run_pieces(int64_t pieces, int threads, Order order, void (*work)(const void* context, int64_t piece),
                const void* context) {
  const double begin = now();
  if (threads <= 1 || pieces <= 1 || lateness.alone(pieces, threads)) {
    for (int64_t i = 0; i < pieces; ++i) work(context, order == Order::kForward ? i : pieces - 1 - i);
    if (threads > 1 && pieces > 1) lateness.went_alone(pieces, threads, now() - begin);
    return;
  }
  Shares shares(pieces, threads, order);
  int64_t own = 0;
  double done = begin;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    int64_t count = 0;
    for (int64_t piece; (piece = shares.take(thread)) >= 0; ++count) work(context, piece);
    if (thread == 0) own = count, done = now();
  }
  lateness.went_together(pieces, threads, own, done - begin, now() - done);
}

}  // namespace fused_optim
