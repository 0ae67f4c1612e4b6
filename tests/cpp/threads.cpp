// Tests of csrc/cpu/threads.cpp, which it includes: how threads share pieces, and when one thread does a pass alone.
// Prints the reason and exits with 1 if a test fails.
#include "../../csrc/cpu/threads.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

using namespace fused_optim;

namespace {

void check(bool ok, const char* what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

// Each piece is taken once, even if threads start late or never. If two threads took one piece, the thread sanitizer
// would report a race.
void test_each_piece_once(int64_t pieces, int threads, Order order, std::mt19937& random) {
  Shares shares(pieces, threads, order);
  std::vector<int> taken(static_cast<size_t>(pieces));
  std::vector<std::thread> team;
  for (int i = 0; i < threads; ++i) {
    const auto delay = std::chrono::microseconds(random() % 4 == 0 ? 0 : random() % 300);
    const bool never_comes = i > 0 && random() % 5 == 0;
    if (never_comes) continue;
    team.emplace_back([&, i, delay] {
      std::this_thread::sleep_for(delay);
      for (int64_t piece; (piece = shares.take(i)) >= 0;) ++taken[static_cast<size_t>(piece)];
      check(shares.take(i) == -1, "a piece after the last one");
    });
  }
  for (std::thread& thread : team) thread.join();
  for (const int count : taken) check(count == 1, "a piece was taken twice, or by nobody");
}

std::vector<int64_t> all_of(Shares& shares, int thread) {
  std::vector<int64_t> order;
  for (int64_t piece; (piece = shares.take(thread)) >= 0;) order.push_back(piece);
  return order;
}

void test_order() {
  Shares forward(10, 2, Order::kForward);
  check(forward.take(0) == 0 && forward.take(1) == 5 && forward.take(0) == 1, "shares are halves, walked in order");
  check(all_of(forward, 1) == std::vector<int64_t>({6, 7, 8, 9, 3, 4, 2}), "then the far half of the slowest one's");
  Shares backward(10, 3, Order::kBackward);  // shares of 3, 3 and 4
  check(backward.take(0) == 2 && backward.take(1) == 5 && backward.take(2) == 9, "backward: the last of each share");
  check(backward.take(2) == 8 && backward.take(0) == 1, "and down from there");
}

// The mean seconds per pass for each of `sizes` (numbers of pieces), which take turns. In this simulation one thread
// needs kPiece seconds per piece, and a parallel region needs half the time plus waits(pass).
constexpr double kPiece = 12e-6;

template <class F>
std::vector<double> means_of(int passes, const std::vector<int64_t>& sizes, const F& waits) {
  Lateness policy;
  std::vector<double> means(sizes.size());
  for (int pass = 0; pass < passes; ++pass) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      const double alone = kPiece * static_cast<double>(sizes[i]);
      const double wait = waits(pass);
      if (policy.alone(sizes[i], 2)) {
        policy.went_alone(sizes[i], 2, alone);
        means[i] += alone / passes;
      } else {
        policy.went_together(sizes[i], 2, sizes[i] / 2, alone / 2, wait);
        means[i] += (alone / 2 + wait) / passes;
      }
    }
  }
  return means;
}

void test_lateness() {
  const auto quiet = [](int) { return 5e-6; };
  const auto crowded = [](int) { return 8e-3; };
  const auto spike = [](int pass) { return pass % 100 == 0 ? 4e-3 : 5e-6; };
  const auto recovers = [](int pass) { return pass < 5000 ? 8e-3 : 5e-6; };
  std::mt19937 random(0);
  const auto half_crowded = [&](int) { return random() % 2 ? 8e-3 : 5e-6; };
  check(means_of(10000, {30}, half_crowded)[0] < 1.15 * 0.36e-3, "on one that is late now and then, too");
  check(means_of(10000, {30}, quiet)[0] < 0.19e-3, "on a quiet machine all passes go together");
  check(means_of(10000, {30}, crowded)[0] < 1.1 * 0.36e-3, "on a crowded one nearly all go alone");
  check(means_of(10000, {30}, spike)[0] < 0.36e-3, "a wait now and then does not end it");
  check(means_of(20000, {30}, recovers)[0] < 0.3e-3, "what was crowded and is no more goes together again");
  const std::vector<double> means = means_of(10000, {30, 15000}, crowded);
  check(means[0] < 1.1 * 0.36e-3 && means[1] < 99e-3, "large passes go together even so, small ones in between alone");
}

std::atomic<int64_t> sum{0};

void test_region() {
  for (const int threads : {1, 2, 3}) {
    for (const int64_t pieces : {0, 1, 2, 3, 1000}) {
      sum = 0;
      run_pieces(
          pieces, threads, Order::kBackward,
          [](const void* add, int64_t piece) { sum += piece + *static_cast<const int*>(add); }, &threads);
      check(sum == pieces * (pieces - 1) / 2 + pieces * threads, "a region does every piece");
    }
  }
}

}  // namespace

int main(int arguments, char**) {
  std::mt19937 random(0);
  for (int round = 0; round < 60; ++round) {
    const auto pieces = static_cast<int64_t>(random() % (round % 2 ? 20 : 3000));
    test_each_piece_once(pieces, 1 + static_cast<int>(random() % 12), round % 3 ? Order::kForward : Order::kBackward,
                         random);
  }
  test_order();
  test_lateness();
  if (arguments == 1) test_region();  // with an argument: the thread sanitizer does not know OpenMP
  std::puts("every piece once");
}
