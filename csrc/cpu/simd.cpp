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
    {"avx512", avx512::walker},
    {"avx2", avx2::walker},
#endif
    {"baseline", baseline::walker},
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

}  // namespace fused_optim
