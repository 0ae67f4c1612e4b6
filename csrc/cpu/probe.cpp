#include <algorithm>
#include <utility>

#include "grads.h"

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int64_t kBlock = 256;  // bytes of each stream between two prefetches, as in a step

// `zero` is 0. The compiler must not know this, or it would remove the writes.
template <int W, int R>
uint64_t pass(const ProbeSpan& span, int prefetch, uint64_t zero) {
  uint64_t seen = 0;
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int64_t bytes = std::min(kBlock, span.end - begin), words = bytes / 8;
    uint64_t* streams[W + R];
    for (int s = 0; s < W + R; ++s) {
      char* const at = span.row->streams[s] + begin;
      if (prefetch != 0) {
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + prefetch + byte);
      }
      streams[s] = reinterpret_cast<uint64_t*>(at);
    }
#pragma omp simd reduction(| : seen)
    for (int64_t i = 0; i < words; ++i) {
      for (int s = W; s < W + R; ++s) seen |= streams[s][i];
      for (int s = 0; s < W; ++s) streams[s][i] |= zero;
    }
  }
  return seen;
}

template <int W, int R>
void run(const std::vector<ProbeSpan>& spans, const ProbePattern& pattern) {
  static volatile uint64_t nothing = 0;
  const uint64_t zero = nothing;
  uint64_t seen = 0;
  if (pattern.threads == 1) {
    for (const ProbeSpan& span : spans) seen |= pass<W, R>(span, pattern.prefetch, zero);
  } else if (pattern.piece == 0) {
#pragma omp parallel for num_threads(pattern.threads) schedule(static) reduction(| : seen)
    for (size_t i = 0; i < spans.size(); ++i) seen |= pass<W, R>(spans[i], pattern.prefetch, zero);
  } else {
#pragma omp parallel for num_threads(pattern.threads) schedule(dynamic) reduction(| : seen)
    for (size_t i = 0; i < spans.size(); ++i) seen |= pass<W, R>(spans[i], pattern.prefetch, zero);
  }
  if (seen == 0x5eed) nothing = zero;
}

template <int... I>
bool choose(int choice, const std::vector<ProbeSpan>& spans, const ProbePattern& pattern,
            std::integer_sequence<int, I...>) {
  return ((choice == I && (run<I / kProbeRead + 1, I % kProbeRead + 1>(spans, pattern), true)) || ...);
}

}  // namespace

bool bandwidth_probe(const std::vector<ProbeSpan>& spans, int written, int read, const ProbePattern& pattern) {
  if (written < 1 || read < 1 || read > kProbeRead) return false;
  return choose((written - 1) * kProbeRead + read - 1, spans, pattern,
                std::make_integer_sequence<int, kProbeWritten * kProbeRead>{});
}

}  // namespace fused_optim::FUSED_ISA
