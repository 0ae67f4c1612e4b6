// The CUDA walker's kernels. nvcc compiles them for the GPU (step.cu). g++ compiles the same code for the CPU
// (emulate.cpp, which emulates blocks and threads), so tests without a GPU cover its indices and memory accesses.
#pragma once
#include "../dispatch.h"
#include "../prep.h"
#include "formats.cuh"

namespace fused_optim {

constexpr int kThreads = 128;        // per block of a kernel that handles one chunk, or sums one row
constexpr int kRowThreads = 32;      // per block of prepare: small blocks spread the float64 work over the GPU
constexpr int kTotalThreads = 1024;  // per block that sums one share of the chunks' sums

// Which pass a kernel does. kUpdate is the whole step of rules without a trust ratio. Rules with one are walked by
// kUpdateMoments, and by kApplyUpdate once the ratios are known. kSquares reads gradients only.
enum class Pass { kUpdate, kUpdateMoments, kApplyUpdate, kSquares };

// Streams are numbered as in the signature: param, grad, states. The average of the weights, if there is one, comes
// directly after the states.

constexpr bool reads(Pass pass, int stream) {
  if (pass == Pass::kSquares) return stream == kStreamGrad;
  return pass != Pass::kApplyUpdate || stream != kStreamGrad;
}

constexpr bool writes(Pass pass, int stream) {
  if (stream == kStreamParam) return pass == Pass::kUpdate || pass == Pass::kApplyUpdate;
  return stream != kStreamGrad && (pass == Pass::kUpdate || pass == Pass::kUpdateMoments);
}

constexpr bool sums_up(Pass pass) { return pass == Pass::kUpdateMoments || pass == Pass::kSquares; }

// Sums over elements. No initializers, because shared memory holds them, too.
struct Sums {
  double first, second;  // squares of the two numbers that the rule measures; `first`: of the gradients in kSquares

  FUSED_HD Sums& operator+=(const Sums& other) {
    first += other.first;
    second += other.second;
    return *this;
  }
};

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

// The scalars of a row. In the second walk of a rule with a trust ratio, lr is multiplied by the ratio. kSquares runs
// before prepare and has no scalars.
template <Pass pass, class T>
FUSED_HD TensorScalars<T> scalars_of(const Tables& t, int64_t row) {
  if constexpr (pass == Pass::kSquares) {
    return {};
  } else {
    const double* in = t.tensor_scalars + row * kScalarWidth;
    TensorScalars<T> h = read_tensor_scalars<T>(in);
    if constexpr (pass == Pass::kApplyUpdate) h.lr = static_cast<T>(in[kScalarLr] * t.trust[row]);
    return h;
  }
}

// Updates param and states of one element.
template <Pass pass, class Rule, class T, int S>
FUSED_HD void update_element(const TensorScalars<T>& h, T& param, T grad, T (&state)[S > 0 ? S : 1]) {
  if constexpr (pass == Pass::kUpdate) param = apply<Rule, T, S>(h, param, grad, state);
  else if constexpr (pass == Pass::kUpdateMoments)
    Rule::template update_moments<T, S>(h, gradient(h, param, grad), state);
  else if constexpr (pass == Pass::kApplyUpdate) param = apply_direction<Rule, T, S>(h, param, state);
}

// sum + x * x. The square of a float is exact in double, so fma gives the same result with one instruction less.
template <class T>
FUSED_HD double plus_square(double sum, T x) {
  const double wide = x;
  return sizeof(T) == 4 ? fma(wide, wide, sum) : sum + wide * wide;
}

// Adds one element to the sums. The states are those that were stored, because kApplyUpdate computes the update from
// them.
template <Pass pass, class Rule, class T, int S>
FUSED_HD void measure_element(const TensorScalars<T>& h, T param, T grad, const T (&state)[S > 0 ? S : 1], Sums& sums) {
  if constexpr (pass == Pass::kUpdateMoments) {
    const Measured<T> measured = Rule::template measure<T, S>(h, param, gradient(h, param, grad), state);
    sums.first = plus_square(sums.first, measured.first);
    sums.second = plus_square(sums.second, measured.second);
  } else if constexpr (pass == Pass::kSquares) {
    sums.first = plus_square(sums.first, grad);
  }
}

// Whether the update needs the registers of one more stream. A rule with squares among its states takes roots and
// divides, and the average stays in registers until then.
template <Pass pass, class Rule, bool kAverages>
constexpr bool crowds() {
  if constexpr (pass == Pass::kUpdate && kAverages) return Rule::signed_states < Rule::max_states;
  return false;
}

// One thread's share of the whole vectors of one chunk. kStored: the format of all streams; kAbsent if they differ or
// have another format. Returns the number of elements in the vectors of all threads.
template <Pass pass, class Rule, bool kAverages, int kStored, class T, int S>
FUSED_HD int update_vectors(const TensorScalars<T>& h, const Stream (&streams)[kStreamState0 + S + kAverages],
                            int count, int thread, Sums& sums) {
  constexpr int kAverage = kStreamState0 + S, kStreams = kAverage + kAverages, kPart = kAccess / sizeof(T);
  constexpr int V = kVector<T, kStored, kStreams - (pass == Pass::kApplyUpdate) + crowds<pass, Rule, kAverages>()>;
  Stream stream[kStreams];
  for (int i = 0; i < kStreams; ++i) {
    if (!reads(pass, i)) continue;
    stream[i] = streams[i];
    if (kStored != kAbsent) stream[i].format = static_cast<Format>(kStored);
  }
  const int vectored = count - count % V;
  Pack<T, V> pack[kStreams];
  const auto load_all = [&](int first, int gap) {
    for (int i = 0; i < kStreams; ++i) {
      if (reads(pass, i)) load(stream[i], first, gap, pack[i]);
    }
  };
  // bfloat16: the loads of the next iteration are issued before the arithmetic of this one, if registers suffice.
  constexpr bool kAhead = kStored == kBfloat16 && pass != Pass::kSquares && !kAverages && kStreams <= 4;
  if (kAhead && thread * V < vectored) load_all(thread * V, kPart);

  for (int piece = 0; piece < vectored; piece += kThreads * V) {
    // If all streams are float32, neighbouring threads access neighbouring 16 bytes.
    const bool spread = kStored == kFloat32 && piece + kThreads * V <= vectored;
    const int gap = spread ? kThreads * kPart : kPart;
    const int first = piece + thread * (spread ? kPart : V);
    if (first >= vectored) break;
    T x[kStreams][V];
    // All loads are issued before the first use.
    if (!kAhead) load_all(first, gap);
    for (int i = 0; i < kStreams; ++i) {
      if (reads(pass, i)) unpack(pack[i], stream[i].format, x[i]);
    }
    // The last iteration loads its own vectors again, from the cache, and does not use them. A condition on these loads
    // would cost an instruction per word.
    if (kAhead) load_all(first + kThreads * V < vectored ? first + kThreads * V : first, gap);
    for (int v = 0; v < V; ++v) {
      T state[S > 0 ? S : 1];
      for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s][v];
      update_element<pass, Rule, T, S>(as_usual(h), x[kStreamParam][v], x[kStreamGrad][v], state);
      for (int s = 0; s < S; ++s) x[kStreamState0 + s][v] = state[s];
    }
    for (int i = 0; i < kAverage; ++i) {
      if (!writes(pass, i)) continue;
      Pack<T, V> stored;
      pack_up(x[i], stream[i].format, stored);
      store(stream[i], first, gap, stored);
      if (sums_up(pass) || (kAverages && i == kStreamParam)) unpack(stored, stream[i].format, x[i]);
    }
    if constexpr (kAverages) {
      for (int v = 0; v < V; ++v) x[kAverage][v] = averaged(h, x[kAverage][v], x[kStreamParam][v]);
      Pack<T, V> stored;
      pack_up(x[kAverage], stream[kAverage].format, stored);
      store(stream[kAverage], first, gap, stored);
    }
    for (int v = 0; v < V; ++v) {
      T state[S > 0 ? S : 1];
      for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s][v];
      measure_element<pass, Rule, T, S>(h, x[kStreamParam][v], x[kStreamGrad][v], state, sums);
    }
  }
  return vectored;
}

// One thread's share of one chunk.
template <Pass pass, class Rule, bool kAverages, class T, int S>
FUSED_HD Sums update_chunk(const Tables& t, int64_t row_number, int64_t chunk, bool unaligned, int thread) {
  constexpr int kAverage = kStreamState0 + S, kStreams = kAverage + kAverages;
  const TensorScalars<T> h = scalars_of<pass, T>(t, row_number);
  const int64_t* row = t.rows + row_number * kRowWidth;
  const int64_t signature = row[kRowDtypeSignature], grad = t.grads[row_number];
  const int64_t begin = chunk * kChunk, left = row[kRowNumel] - begin;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  Stream stream[kStreams];
  bool all_float32 = true, all_bfloat16 = true;
  for (int i = 0; i < kStreams; ++i) {
    if (!reads(pass, i)) continue;
    const int place = i == kAverage ? kStreamEma : i;
    const int64_t address = i == kStreamGrad ? grad : row[address_column(place)];
    // If T is double, all streams are float64. A constant format saves registers, which are scarce with an average.
    stream[i] = Stream(address, kAverages && sizeof(T) == 8 ? kFloat64 : format_of(signature, place), begin);
    all_float32 = all_float32 && stream[i].format == kFloat32;
    all_bfloat16 = all_bfloat16 && stream[i].format == kBfloat16;
  }
  // `unaligned` covers param, states and average.
  const bool aligned = !(reads(pass, kStreamParam) && unaligned) && !(reads(pass, kStreamGrad) && grad % kAccess != 0);
  Sums sums{};
  const bool special = (pass != Pass::kApplyUpdate && has_small_betas(h)) || h.cautious_decay != T(0);
  const bool by_vectors = aligned && !special;
  int vectored = 0;
  // The usual formats have loops of their own, without branches on formats.
  if constexpr (sizeof(T) == 8) {
    if (by_vectors) vectored = update_vectors<pass, Rule, kAverages, kFloat64, T, S>(h, stream, count, thread, sums);
  } else if (by_vectors) {
    vectored = all_float32    ? update_vectors<pass, Rule, kAverages, kFloat32, T, S>(h, stream, count, thread, sums)
               : all_bfloat16 ? update_vectors<pass, Rule, kAverages, kBfloat16, T, S>(h, stream, count, thread, sums)
                              : update_vectors<pass, Rule, kAverages, kAbsent, T, S>(h, stream, count, thread, sums);
  }

  for (int element = vectored + thread; element < count; element += kThreads) {
    T x[kStreams], state[S > 0 ? S : 1];
    for (int i = 0; i < kStreams; ++i) {
      if (reads(pass, i)) x[i] = load_one<T>(stream[i], element);
    }
    for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s];
    update_element<pass, Rule, T, S>(h, x[kStreamParam], x[kStreamGrad], state);
    for (int s = 0; s < S; ++s) x[kStreamState0 + s] = state[s];
    for (int i = 0; i < kAverage; ++i) {
      if (!writes(pass, i)) continue;
      store_one(stream[i], element, x[i]);
      if (sums_up(pass) || (kAverages && i == kStreamParam)) x[i] = load_one<T>(stream[i], element);
    }
    if constexpr (kAverages) {
      store_one(stream[kAverage], element, averaged(h, x[kAverage], x[kStreamParam]));
    }
    for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s];
    measure_element<pass, Rule, T, S>(h, x[kStreamParam], x[kStreamGrad], state, sums);
  }
  return sums;
}

}  // namespace fused_optim

#include "packed.cuh"  // uses the definitions above

namespace fused_optim {

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
