// The CUDA walker's kernels. nvcc compiles them for the GPU (step.cu). g++ compiles the same code for the CPU
// (emulate.cpp, which emulates blocks and threads), so tests without a GPU cover its indices and memory accesses.
#pragma once
#include "../dispatch.h"
#include "packed.cuh"
#include "walk.cuh"

namespace fused_optim {

constexpr int kRowThreads = 32;      // per block of prepare: small blocks spread the float64 work over the GPU
constexpr int kTotalThreads = 1024;  // per block that sums one share of the chunks' sums

// A kernel is a sequence of phases. Every thread of the block runs each phase: `each_thread` is the first phase,
// `then_each_thread` a later one, which sees what all threads wrote before. emulate.cpp defines both for the CPU.
#ifdef __CUDACC__
template <int kCount, class F>
__device__ __forceinline__ void each_thread(F&& share) {
  share(static_cast<int>(threadIdx.x));
}

template <int kCount, class F>
__device__ __forceinline__ void then_each_thread(F&& share) {
  __syncthreads();
  share(static_cast<int>(threadIdx.x));
}
#endif

FUSED_HD bool skipped(const Tables& t, int64_t row) {
  return t.tensor_scalars[row * kScalarWidth + kScalarSkip] != 0.0;
}

// One row per thread.
template <class Rule>
__global__ void prep_kernel(Tables t) {
  each_thread<kRowThreads>([&](int thread) {
    const int64_t row = int64_t{blockIdx.x} * kRowThreads + thread;
    BiasCorrections memo{};
    if (row < t.tensors) prepare<Rule>(t, row, memo);
  });
}

template <class Rule>
__global__ void trust_kernel(Tables t) {
  each_thread<kRowThreads>([&](int thread) {
    const int64_t row = int64_t{blockIdx.x} * kRowThreads + thread;
    if (row < t.tensors && !skipped(t, row)) t.trust[row] = ratio_of<Rule>(t, row);
  });
}

// Sums the values that the threads of a block wrote into `part`, in a fixed order. The first thread gets the sum.
template <int kCount, class X, class F>
__device__ void add_up(X (&part)[kCount], F&& take) {
  for (int width = kCount / 2; width > 0; width /= 2) {
    then_each_thread<kCount>([&](int thread) {
      if (thread < width) part[thread] += part[thread + width];
    });
  }
  then_each_thread<kCount>([&](int thread) {
    if (thread == 0) take(part[0]);
  });
}

// Five blocks per SM keep 64 bytes or more in flight per thread; more would spill. With packed formats five would
// spill, too, and with an average besides, three. An update that adds up several averages of the gradient needs more
// registers: four blocks, or two. kPacked: whether a stream of the table has a packed format.
template <Pass pass, class Rule, bool kAverages, bool kPacked>
constexpr int blocks_per_sm() {
  const bool several = pass != Pass::kApplyUpdate && Rule::signed_states > 1;
  if (kPacked) return kAverages || several ? 2 : 4;
  return several && pass == Pass::kUpdate ? 4 : 5;
}

template <Pass pass, class Rule, bool kAverages, bool kPacked>
__global__ void __launch_bounds__(kThreads, blocks_per_sm<pass, Rule, kAverages, kPacked>()) step_kernel(Tables t) {
  const int64_t entry = t.chunk_table[blockIdx.x], row = row_of(entry), chunk = chunk_of(entry);
  if (skipped(t, row)) return;
  const int64_t signature = t.rows[row * kRowWidth + kRowDtypeSignature];
  const auto share = [&](int thread) {
    Sums sums;
    visit_states<Rule>(signature, [&](auto states) {
      constexpr int S = decltype(states)::value;
      if (format_of(signature, kStreamParam) == kFloat64)
        sums = update_chunk<pass, Rule, kAverages, double, S>(t, row, chunk, is_unaligned(entry), thread);
      else if constexpr (kPacked)
        sums = update_packed_chunk<pass, Rule, kAverages, S>(t, row, chunk, is_unaligned(entry), thread);
      else sums = update_chunk<pass, Rule, kAverages, float, S>(t, row, chunk, is_unaligned(entry), thread);
    });
    return sums;
  };
  if constexpr (pass == Pass::kUpdateMoments) {
    __shared__ Sums part[kThreads];
    each_thread<kThreads>([&](int thread) { part[thread] = share(thread); });
    add_up(part, [&](const Sums& sums) {
      t.partials[2 * int64_t{blockIdx.x}] = sums.first;
      t.partials[2 * int64_t{blockIdx.x} + 1] = sums.second;
    });
  } else {
    each_thread<kThreads>(share);
  }
}

// Sums the chunks' sums over each row, one row per block.
__global__ void __launch_bounds__(kThreads) sum_kernel(Tables t) {
  __shared__ Sums part[kThreads];
  const int64_t row = blockIdx.x, end = skipped(t, row) ? 0 : t.row_offsets[row + 1];
  each_thread<kThreads>([&](int thread) {
    Sums sums{};
    for (int64_t i = t.row_offsets[row] + thread; i < end; i += kThreads)
      sums += {t.partials[2 * i], t.partials[2 * i + 1]};
    part[thread] = sums;
  });
  add_up(part, [&](const Sums& sums) {
    t.sums[2 * row] = sums.first;
    t.sums[2 * row + 1] = sums.second;
  });
}

// The sum of the squares of a gradient over each chunk, if its group is clipped.
__global__ void __launch_bounds__(kThreads) squares_kernel(Tables t) {
  __shared__ double part[kThreads];
  const int64_t entry = t.chunk_table[blockIdx.x], row = row_of(entry), chunk = chunk_of(entry);
  const double max_norm = t.group_hparams[int64_t{t.group_index[row]} * kGroupWidth + kGroupMaxNorm],
               counted = max_norm > 0.0 ? 1.0 : 0.0;
  const bool looks = t.grads[row] != 0 && max_norm != 0.0;
  const bool wide = format_of(t.rows[row * kRowWidth + kRowDtypeSignature], kStreamGrad) == kFloat64;
  each_thread<kThreads>([&](int thread) {
    Sums sums{};
    if (looks && wide)
      sums = update_chunk<Pass::kSquares, void, false, double, 0>(t, row, chunk, is_unaligned(entry), thread);
    else if (looks)
      sums = update_chunk<Pass::kSquares, void, false, float, 0>(t, row, chunk, is_unaligned(entry), thread);
    part[thread] = sums.first;
  });
  add_up(part, [&](double sum) { t.partials[blockIdx.x] = sum * counted; });
}

// Sums numbers, kShare of them per block: out[i] is the sum of share i. The order of the additions is the same on every
// GPU: thread t adds the share's numbers t, t + kTotalThreads, ... to 0 in this order. Then add_up adds the threads'
// sums in pairs.
__global__ void __launch_bounds__(kTotalThreads) total_kernel(const double* numbers, int64_t count, double* out) {
  __shared__ double part[kTotalThreads];
  const int64_t first = int64_t{blockIdx.x} * kShare;
  each_thread<kTotalThreads>([&](int thread) {
    double sum = 0.0;
    for (int i = thread; i < kShare; i += kTotalThreads) sum += first + i < count ? numbers[first + i] : 0.0;
    part[thread] = sum;
  });
  add_up(part, [&](double sum) { out[blockIdx.x] = sum; });
}

inline int64_t row_blocks(const Tables& t) { return (t.tensors + kRowThreads - 1) / kRowThreads; }

using StepKernel = void (*)(Tables);

// The kernel for the table's formats.
template <Pass pass, class Rule, bool kAverages>
StepKernel step_kernel_of(const Tables& t) {
  return t.packed ? step_kernel<pass, Rule, kAverages, true> : step_kernel<pass, Rule, kAverages, false>;
}

// The kernels of each entry point, in order. launch(kernel, blocks, threads, arguments...) runs one if it has blocks.
template <class Rule, class Launch>
void launch_step(const Tables& t, Launch&& launch) {
  launch(prep_kernel<Rule>, row_blocks(t), kRowThreads, t);
  if constexpr (Rule::trust) {
    launch(step_kernel_of<Pass::kUpdateMoments, Rule, false>(t), t.chunks, kThreads, t);
    launch(sum_kernel, t.tensors, kThreads, t);
  } else {
    launch(t.ema ? step_kernel_of<Pass::kUpdate, Rule, true>(t) : step_kernel_of<Pass::kUpdate, Rule, false>(t),
           t.chunks, kThreads, t);
  }
}

template <class Rule, class Launch>
void launch_apply_update(const Tables& t, Launch&& launch) {
  if constexpr (Rule::trust) {
    launch(trust_kernel<Rule>, row_blocks(t), kRowThreads, t);
    launch(
        t.ema ? step_kernel_of<Pass::kApplyUpdate, Rule, true>(t) : step_kernel_of<Pass::kApplyUpdate, Rule, false>(t),
        t.chunks, kThreads, t);
  }
}

template <class Launch>
void launch_squares(const Tables& t, double* out, Launch&& launch) {
  launch(squares_kernel, t.chunks, kThreads, t);
  // The sums of shares are stored after the numbers, and are summed in turn until one is left.
  const double* numbers = t.partials;
  int64_t count = t.chunks;
  for (double* sums = t.partials + count; count > kShare; sums += count) {
    const int64_t shares = (count + kShare - 1) / kShare;
    launch(total_kernel, shares, kTotalThreads, numbers, count, sums);
    numbers = sums;
    count = shares;
  }
  launch(total_kernel, int64_t{1}, kTotalThreads, numbers, count, out);
}

}  // namespace fused_optim
