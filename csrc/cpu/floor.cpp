#include "floor.h"

#include <algorithm>
#include <utility>

namespace fused_optim {
namespace {

constexpr int64_t kSpan = 16384;  // bytes of each stream in one piece of work, as kChunk float32 elements

// `zero` is 0, which the compiler must not know.
template <int W>
uint64_t pass(const FloorSpan& span, uint64_t zero) {
  const int64_t words = std::min(kSpan, span.row->bytes - span.begin) / 8;
  uint64_t* written[W];
  for (int s = 0; s < W; ++s) written[s] = reinterpret_cast<uint64_t*>(span.row->streams[s] + span.begin);
  const uint64_t* read = reinterpret_cast<const uint64_t*>(span.row->streams[W] + span.begin);
  uint64_t seen = 0;
#pragma omp simd reduction(| : seen)
  for (int64_t i = 0; i < words; ++i) {
    seen |= read[i];
    for (int s = 0; s < W; ++s) written[s][i] |= zero;
  }
  return seen;
}

template <int W>
void run(const std::vector<FloorSpan>& spans, int threads) {
  static volatile uint64_t nothing = 0;
  const uint64_t zero = nothing;
  uint64_t seen = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : seen)
  for (size_t i = 0; i < spans.size(); ++i) seen |= pass<W>(spans[i], zero);
  if (seen == 0x5eed) nothing = zero;
}

template <int... W>
bool choose(int written, const std::vector<FloorSpan>& spans, int threads, std::integer_sequence<int, W...>) {
  return ((written == W + 1 && (run<W + 1>(spans, threads), true)) || ...);
}

}  // namespace

std::vector<FloorSpan> floor_spans(const std::vector<FloorRow>& rows) {
  std::vector<FloorSpan> spans;
  for (const FloorRow& row : rows) {
    for (int64_t begin = 0; begin < row.bytes; begin += kSpan) spans.push_back({&row, begin});
  }
  return spans;
}

bool floor_pass(const std::vector<FloorSpan>& spans, int written, int threads) {
  return choose(written, spans, threads, std::make_integer_sequence<int, 8>{});
}

}  // namespace fused_optim
