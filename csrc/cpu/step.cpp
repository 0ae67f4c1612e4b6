// The CPU walker: one parallel region for the whole step, whatever the number of tensors, groups and dtypes.
// setup.py compiles this file once per instruction set, with FUSED_ISA naming the namespace; simd.cpp chooses at run
// time.
#include "step.h"

#include <algorithm>

#include "../convert.h"
#include "../dispatch.h"
#include "../prep.h"

#ifndef FUSED_ISA
#define FUSED_ISA baseline
#endif

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int kBlock = 256;  // elements between two looks at dtypes and prefetches; every stream's block stays in L1
constexpr int kPrefetchBytes = 512;  // how far ahead of the block

// One tensor of a row: where it lies and what it holds.
struct Stream {
  char* data;
  Dtype dtype;
  int itemsize;

  Stream(int64_t address, int64_t signature, int position)
      : data(reinterpret_cast<char*>(address)), dtype(dtype_of(signature, position)) {
    itemsize = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  }

  char* at(int64_t element) const { return data + element * itemsize; }
};

template <class T>
constexpr Dtype kNative = sizeof(T) == 4 ? kFloat32 : kFloat64;

void prefetch(const char* from, int bytes) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + kPrefetchBytes + line);
}

// The block as T: the tensor's own memory where it holds T, else widened into `scratch`.
template <class T>
T* open(const Stream& stream, int64_t element, int count, T* scratch) {
  prefetch(stream.at(element), count * stream.itemsize);
  if (stream.dtype == kNative<T>) return reinterpret_cast<T*>(stream.at(element));
  const uint16_t* in = reinterpret_cast<const uint16_t*>(stream.at(element));
  if (stream.dtype == kBFloat16) {
    for (int i = 0; i < count; ++i) scratch[i] = bf16_to_float(in[i]);
  } else {
    for (int i = 0; i < count; ++i) scratch[i] = f16_to_float(in[i]);
  }
  return scratch;
}

template <class T>
void close(const Stream& stream, int64_t element, int count, const T* scratch) {
  if (stream.dtype == kNative<T>) return;
  uint16_t* out = reinterpret_cast<uint16_t*>(stream.at(element));
  if (stream.dtype == kBFloat16) {
    for (int i = 0; i < count; ++i) out[i] = float_to_bf16(static_cast<float>(scratch[i]));
  } else {
    for (int i = 0; i < count; ++i) out[i] = float_to_f16(static_cast<float>(scratch[i]));
  }
}

template <class Rule, class T, int S>
void update_block(const Hyper<T>& hyper, T* param, const T* grad, T* const* states, int count) {
  const Hyper<T> h = hyper;
  T* state[S > 0 ? S : 1];
  for (int s = 0; s < S; ++s) state[s] = states[s];
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    T value[S > 0 ? S : 1];
    for (int s = 0; s < S; ++s) value[s] = state[s][i];
    param[i] = apply<Rule, T, S>(h, param[i], grad[i], value);
    for (int s = 0; s < S; ++s) state[s][i] = value[s];
  }
}

template <class Rule, class T, int S>
void update_chunk(const Tables& t, int64_t row_number, int64_t chunk) {
  const int64_t* row = t.rows + row_number * kRowWidth;
  const Hyper<T> h = read_hyper<T>(t.hyper + row_number * kHyperWidth);
  const int64_t begin = chunk * kChunk, end = std::min(row[kNumel], begin + kChunk);
  const Stream param(row[kParam], row[kSignature], 0), grad(t.grads[row_number], row[kSignature], 1);
  alignas(64) T scratch[2 + S][kBlock];
  T* states[S > 0 ? S : 1];

  for (int64_t element = begin; element < end; element += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - element));
    T* p = open(param, element, count, scratch[0]);
    const T* g = open(grad, element, count, scratch[1]);
    for (int s = 0; s < S; ++s)
      states[s] = open(Stream(row[kFirstState + s], row[kSignature], 2 + s), element, count, scratch[2 + s]);
    update_block<Rule, T, S>(h, p, g, states, count);
    close(param, element, count, p);
    for (int s = 0; s < S; ++s) close(Stream(row[kFirstState + s], row[kSignature], 2 + s), element, count, states[s]);
  }
}

template <class Rule>
void update(const Tables& t, int64_t desc) {
  const int64_t row = (desc >> 8) & 0xffffff, chunk = desc >> 32;
  if (t.hyper[row * kHyperWidth + kSkip] != 0.0) return;
  const int64_t signature = t.rows[row * kRowWidth + kSignature];
  visit_states<Rule>(signature, [&](auto states) {
    constexpr int S = decltype(states)::value;
    if ((signature & 15) == kFloat64) update_chunk<Rule, double, S>(t, row, chunk);
    else update_chunk<Rule, float, S>(t, row, chunk);
  });
}

}  // namespace

bool step(const char* rule, const Tables& t, int threads) {
  return visit_rule(rule, [&](auto tag) {
    using Rule = typename decltype(tag)::type;
    // Small pieces taken as they come: a static split waits for the slower core as soon as one is shared.
    const int grain = static_cast<int>(std::clamp<int64_t>(t.chunks / (int64_t{threads} * 64), 1, 4));
#pragma omp parallel num_threads(threads)
    {
      BiasCorrections memo{};
#pragma omp for schedule(static)
      for (int64_t row = 0; row < t.tensors; ++row) prepare(t, row, memo);
#pragma omp for schedule(dynamic, grain)
      for (int64_t i = 0; i < t.chunks; ++i) update<Rule>(t, t.desc[i]);
    }
  });
}

}  // namespace fused_optim::FUSED_ISA
