#include "floor.h"

#include <algorithm>
#include <utility>

namespace fused_optim {
namespace {

constexpr int64_t kSpan = 16384;  // bytes of each stream in one piece of work, as kChunk float32 elements

// `zero` is 0, which the compiler must not know.
template <int W, int R>
uint64_t pass(const FloorSpan& span, uint64_t zero) {
  const int64_t words = std::min(kSpan, span.row->bytes - span.begin) / 8;
  uint64_t* streams[W + R];
  for (int s = 0; s < W + R; ++s) streams[s] = reinterpret_cast<uint64_t*>(span.row->streams[s] + span.begin);
  uint64_t seen = 0;
#pragma omp simd reduction(| : seen)
  for (int64_t i = 0; i < words; ++i) {
    for (int s = W; s < W + R; ++s) seen |= streams[s][i];
    for (int s = 0; s < W; ++s) streams[s][i] |= zero;
  }
  return seen;
}

template <int W, int R>
void run(const std::vector<FloorSpan>& spans, int threads) {
  static volatile uint64_t nothing = 0;
  const uint64_t zero = nothing;
  uint64_t seen = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : seen)
  for (size_t i = 0; i < spans.size(); ++i) seen |= pass<W, R>(spans[i], zero);
  if (seen == 0x5eed) nothing = zero;
}

template <int... I>
bool choose(int choice, const std::vector<FloorSpan>& spans, int threads, std::integer_sequence<int, I...>) {
  return ((choice == I && (run<I / kFloorRead + 1, I % kFloorRead + 1>(spans, threads), true)) || ...);
}

}  // namespace

std::vector<FloorSpan> floor_spans(const std::vector<FloorRow>& rows) {
  std::vector<FloorSpan> spans;
  for (const FloorRow& row : rows) {
    for (int64_t begin = 0; begin < row.bytes; begin += kSpan) spans.push_back({&row, begin});
  }
  return spans;
}

bool floor_pass(const std::vector<FloorSpan>& spans, int written, int read, int threads) {
  if (written < 1 || read < 1 || read > kFloorRead) return false;
  return choose((written - 1) * kFloorRead + read - 1, spans, threads,
                std::make_integer_sequence<int, kFloorWritten * kFloorRead>{});
}

}  // namespace fused_optim
