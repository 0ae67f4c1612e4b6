// Software prefetch of the streams of a loop.
#pragma once
#include "../layout.h"

#ifndef FUSED_ISA
#define FUSED_ISA baseline
#endif

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int kPrefetchBytes = 2048;  // prefetch distance

// Prefetches the lines that are kPrefetchBytes after `count` elements at `at`.
template <class X>
FUSED_HD void prefetch_ahead(const X* at, int count) {
  const char* ahead = reinterpret_cast<const char*>(at) + kPrefetchBytes;
  const int size = count * static_cast<int>(sizeof(X));
#pragma GCC unroll 8
  for (int byte = 0; byte < size; byte += 64) __builtin_prefetch(ahead + byte);
}

}  // namespace
}  // namespace fused_optim::FUSED_ISA
