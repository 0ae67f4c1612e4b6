#include "simd.h"

#include <cstdlib>
#include <cstring>

namespace fused_optim {
namespace {

bool supported(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(name, "baseline");
}

const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512", avx512::step},
    {"avx2", avx2::step},
#endif
    {"baseline", baseline::step},
};

const InstructionSet& choose() {
  const char* wanted = std::getenv("FUSED_OPTIM_ISA");
  for (const InstructionSet& set : kSets) {
    if (wanted && std::strcmp(wanted, set.name)) continue;
    if (supported(set.name)) return set;
  }
  return kSets[sizeof(kSets) / sizeof(kSets[0]) - 1];
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

void floor_pass(const int64_t* addresses, const int64_t* sizes, int64_t tensors, int written, int read, int threads) {
  constexpr int64_t kSpan = 16384;  // bytes of each stream that one turn takes, as kChunk float32 elements
  static volatile uint64_t nothing = 0;
  const uint64_t zero = nothing;  // opaque to the compiler: the writes below are real
  const int streams = written + read;
#pragma omp parallel num_threads(threads)
  for (int64_t t = 0; t < tensors; ++t) {
    const int64_t* row = addresses + t * streams;
#pragma omp for schedule(dynamic) nowait
    for (int64_t begin = 0; begin < sizes[t]; begin += kSpan) {
      const int64_t words = (sizes[t] - begin < kSpan ? sizes[t] - begin : kSpan) / 8;
      uint64_t seen = 0;
      for (int64_t at = 0; at < words; at += 128) {  // 1 KB of each stream in turn, as the walker goes
        const int64_t count = words - at < 128 ? words - at : 128;
        for (int s = written; s < streams; ++s) {
          const uint64_t* data = reinterpret_cast<const uint64_t*>(row[s] + begin) + at;
          for (int64_t i = 0; i < count; ++i) seen |= data[i];
        }
        for (int s = 0; s < written; ++s) {
          uint64_t* data = reinterpret_cast<uint64_t*>(row[s] + begin) + at;
          for (int64_t i = 0; i < count; ++i) data[i] |= zero;
        }
      }
      if (seen == 0x5eed5eed5eed5eed) nothing = 0;
    }
  }
}

}  // namespace fused_optim
