// The CUDA walker's kernels. nvcc compiles them for the GPU (step.cu), g++ for the CPU (emulate.cpp, which stands in
// for blocks and threads): what the tests prove of indices and memory on a machine without a GPU is proven of these
// very lines.
#pragma once
#include <cassert>

#include "../convert.h"
#include "../dispatch.h"
#include "../prep.h"

namespace fused_optim {

constexpr int kThreads = 128;     // of a block of step_kernel, which handles one chunk
constexpr int kPrepThreads = 32;  // of a block of prep_kernel: small ones spread the float64 work over the GPU
constexpr int kAccess = 16;       // bytes, the widest load and store

// Elements that a thread takes at once. Eight fill a 16-byte access of every dtype; with three states they would crowd
// the registers of all kinds, for one kernel serves them all.
template <class T, int S>
constexpr int kVector = sizeof(T) == 8 ? 2 : (S <= 2 ? 8 : 4);

// One chunk of one tensor of a row.
struct Stream {
  char* data;
  Dtype dtype;

  FUSED_HD Stream() {}
  FUSED_HD Stream(int64_t address, Dtype dtype, int64_t begin) : dtype(dtype) {
    data = reinterpret_cast<char*>(address + begin * itemsize());
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(data));  // unsaid, every access would be a generic one
#endif
  }

  FUSED_HD int itemsize() const { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
  FUSED_HD char* at(int element) const { return data + element * itemsize(); }
};

// Words (4 or 2) of aligned global memory in one access. In PTX, because nvcc splits a memcpy, and at times a uint4.
template <int kWords>
FUSED_HD void load_words(const char* from, uint32_t* word) {
#ifdef __CUDA_ARCH__
  if constexpr (kWords == 4) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "l"(from)
                 : "memory");
  } else {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(from) : "memory");
  }
#else
  assert(reinterpret_cast<uintptr_t>(from) % (4 * kWords) == 0);
  std::memcpy(word, from, 4 * kWords);
#endif
}

template <int kWords>
FUSED_HD void store_words(char* to, const uint32_t* word) {
#ifdef __CUDA_ARCH__
  if constexpr (kWords == 4) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
  } else {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(word[0]), "r"(word[1]) : "memory");
  }
#else
  assert(reinterpret_cast<uintptr_t>(to) % (4 * kWords) == 0);
  std::memcpy(to, word, 4 * kWords);
#endif
}

// V elements of one tensor as they lie in memory; two-byte dtypes fill the first half of the words.
template <class T, int V>
struct Pack {
  uint32_t word[V * sizeof(T) / 4];
};

// V elements from `first` on. Those as wide as T come in parts of 16 bytes, each starting `gap` elements past the last.
template <class T, int V>
FUSED_HD void load(const Stream& stream, int first, int gap, Pack<T, V>& pack) {
  constexpr int kParts = V * sizeof(T) / kAccess;
  if (sizeof(T) == 8 || stream.dtype == kFloat32) {
    for (int i = 0; i < kParts; ++i) load_words<4>(stream.at(first + i * gap), pack.word + 4 * i);
  } else {
    load_words<2 * kParts>(stream.at(first), pack.word);
  }
}

template <class T, int V>
FUSED_HD void unpack(const Pack<T, V>& pack, Dtype dtype, T (&x)[V]) {
  if (sizeof(T) == 8 || dtype == kFloat32) {
    std::memcpy(x, pack.word, sizeof x);
    return;
  }
  uint16_t half[V];
  std::memcpy(half, pack.word, sizeof half);
  if (dtype == kBFloat16) {
    for (int v = 0; v < V; ++v) x[v] = bf16_to_float(half[v]);
  } else {
    for (int v = 0; v < V; ++v) x[v] = f16_to_float(half[v]);
  }
}

template <class T, int V>
FUSED_HD void store(const Stream& stream, int first, int gap, const T (&x)[V]) {
  constexpr int kParts = V * sizeof(T) / kAccess;
  Pack<T, V> pack;
  if (sizeof(T) == 8 || stream.dtype == kFloat32) {
    std::memcpy(pack.word, x, sizeof x);
    for (int i = 0; i < kParts; ++i) store_words<4>(stream.at(first + i * gap), pack.word + 4 * i);
    return;
  }
  uint16_t half[V];
  if (stream.dtype == kBFloat16) {
    for (int v = 0; v < V; ++v) half[v] = float_to_bf16(static_cast<float>(x[v]));
  } else {
    for (int v = 0; v < V; ++v) half[v] = float_to_f16(static_cast<float>(x[v]));
  }
  std::memcpy(pack.word, half, sizeof half);
  store_words<2 * kParts>(stream.at(first), pack.word);
}

template <class T>
FUSED_HD T load_one(const Stream& stream, int element) {
  const char* from = stream.at(element);
  if constexpr (sizeof(T) == 8) return *reinterpret_cast<const double*>(from);
  if (stream.dtype == kFloat32) return *reinterpret_cast<const float*>(from);
  const uint16_t half = *reinterpret_cast<const uint16_t*>(from);
  return stream.dtype == kBFloat16 ? bf16_to_float(half) : f16_to_float(half);
}

template <class T>
FUSED_HD void store_one(const Stream& stream, int element, T x) {
  char* to = stream.at(element);
  if constexpr (sizeof(T) == 8) *reinterpret_cast<double*>(to) = x;
  else if (stream.dtype == kFloat32) *reinterpret_cast<float*>(to) = x;
  else *reinterpret_cast<uint16_t*>(to) = stream.dtype == kBFloat16 ? float_to_bf16(x) : float_to_f16(x);
}

// One thread's share of one chunk. Streams are numbered as in the signature: param, grad, states.
template <class Rule, class T, int S>
FUSED_HD void update_chunk(const Tables& t, int64_t row_number, int64_t chunk, bool slow, int thread) {
  constexpr int V = kVector<T, S>, kStreams = 2 + S, kGrad = 1, kPart = kAccess / sizeof(T);
  const Hyper<T> h = read_hyper<T>(t.hyper + row_number * kHyperWidth);
  const int64_t* row = t.rows + row_number * kRowWidth;
  const int64_t signature = row[kSignature], grad = t.grads[row_number];
  const int64_t begin = chunk * kChunk, left = row[kNumel] - begin;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  Stream stream[kStreams];
  bool all_float32 = true;
  for (int i = 0; i < kStreams; ++i) {
    const int64_t address = i == 0 ? row[kParam] : i == kGrad ? grad : row[kFirstState + i - 2];
    stream[i] = Stream(address, dtype_of(signature, i), begin);
    all_float32 = all_float32 && stream[i].dtype == kFloat32;
  }
  const int vectored = slow || grad % kAccess != 0 ? 0 : count - count % V;

  for (int piece = 0; piece < vectored; piece += kThreads * V) {
    // Neighbouring threads should access neighbouring 16 bytes: float32 tensors among themselves can have it so.
    const bool spread = all_float32 && piece + kThreads * V <= vectored;
    const int gap = spread ? kThreads * kPart : kPart;
    const int first = piece + thread * (spread ? kPart : V);
    if (first >= vectored) break;
    Pack<T, V> pack[kStreams];
    T x[kStreams][V];
    // All loads before the first use of any.
    for (int i = 0; i < kStreams; ++i) load(stream[i], first, gap, pack[i]);
    for (int i = 0; i < kStreams; ++i) unpack(pack[i], stream[i].dtype, x[i]);
    for (int v = 0; v < V; ++v) {
      T state[S > 0 ? S : 1];
      for (int s = 0; s < S; ++s) state[s] = x[2 + s][v];
      x[0][v] = apply<Rule, T, S>(h, x[0][v], x[kGrad][v], state);
      for (int s = 0; s < S; ++s) x[2 + s][v] = state[s];
    }
    for (int i = 0; i < kStreams; ++i) {
      if (i != kGrad) store(stream[i], first, gap, x[i]);
    }
  }

  for (int element = vectored + thread; element < count; element += kThreads) {
    T state[S > 0 ? S : 1];
    for (int s = 0; s < S; ++s) state[s] = load_one<T>(stream[2 + s], element);
    const T param = load_one<T>(stream[0], element);
    store_one(stream[0], element, apply<Rule, T, S>(h, param, load_one<T>(stream[kGrad], element), state));
    for (int s = 0; s < S; ++s) store_one(stream[2 + s], element, state[s]);
  }
}

__global__ void prep_kernel(Tables t) {
  const int64_t row = int64_t{blockIdx.x} * kPrepThreads + threadIdx.x;
  BiasCorrections memo{};
  if (row < t.tensors) prepare(t, row, memo);
}

// Five blocks on a multiprocessor: 640 threads await 64 bytes or more each. The registers of more would have to spill.
template <class Rule>
__global__ void __launch_bounds__(kThreads, 5) step_kernel(Tables t) {
  const int64_t desc = t.desc[blockIdx.x], row = (desc >> 8) & 0xffffff, chunk = desc >> 32;
  if (t.hyper[row * kHyperWidth + kSkip] != 0.0) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t signature = t.rows[row * kRowWidth + kSignature];
  visit_states<Rule>(signature, [&](auto states) {
    constexpr int S = decltype(states)::value;
    if (dtype_of(signature, 0) == kFloat64) update_chunk<Rule, double, S>(t, row, chunk, desc & 1, thread);
    else update_chunk<Rule, float, S>(t, row, chunk, desc & 1, thread);
  });
}

}  // namespace fused_optim
