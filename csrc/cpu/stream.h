// What the CPU walker's files share: one tensor of a row, whatever its dtype, and how its work is split. Each
// instruction set has its own, in the namespace that FUSED_ISA names.
#pragma once
#include <algorithm>

#include "../convert.h"
#include "../dispatch.h"
#include "../prep.h"
#include "step.h"
#include "threads.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

#ifndef FUSED_ISA
#define FUSED_ISA baseline
#endif

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int kPrefetchBytes = 512;  // how far ahead of what is being worked on

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FUSED_HD float widen(float x) { return x; }
FUSED_HD double widen(double x) { return x; }
FUSED_HD float widen(BFloat16 x) { return bf16_to_float(x.bits); }
FUSED_HD float widen(Float16 x) { return f16_to_float(x.bits); }

FUSED_HD void narrow(float x, float& out) { out = x; }
FUSED_HD void narrow(double x, double& out) { out = x; }
FUSED_HD void narrow(float x, BFloat16& out) { out.bits = float_to_bf16(x); }
FUSED_HD void narrow(float x, Float16& out) { out.bits = float_to_f16(x); }

// Two neighbouring bfloat16 values in one word, at any even address: the odd one is a float32 with a lower half to be
// masked away, the even one has to be shifted. So nothing moves between lanes, which two-byte loads and stores cost.
using Pair = uint32_t __attribute__((may_alias, aligned(2)));

FUSED_HD float even(uint32_t pair) { return bits_float(pair << 16); }
FUSED_HD float odd(uint32_t pair) { return bits_float(pair & 0xffff0000u); }

// Calls f with a value of the type that `dtype` stands for.
template <class F>
void visit_dtype(Dtype dtype, F&& f) {
  if (dtype == kFloat32) f(float{});
  else if (dtype == kBFloat16) f(BFloat16{});
  else f(Float16{});
}

template <class P>
void widen_block(const P* in, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = widen(in[i]);
}

template <class P>
void narrow_block(const float* in, int count, P* out) {
  for (int i = 0; i < count; ++i) narrow(in[i], out[i]);
}

#ifdef __F16C__
// With the processor's own conversions, which the compiler does not think of: some eight times as fast as by bits. They
// keep the lower bits of a NaN; `narrow` does not.
inline __m256 widen_eight(const Float16* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}

inline void narrow_eight(__m256 in, Float16* out) {
  const __m256 sign = _mm256_and_ps(in, _mm256_set1_ps(-0.0f));
  const __m256 nan = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
  const __m256 plain = _mm256_blendv_ps(in, nan, _mm256_cmp_ps(in, in, _CMP_UNORD_Q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(plain, _MM_FROUND_TO_NEAREST_INT));
}

inline void widen_block(const Float16* in, int count, float* out) {
  const int whole = count - count % 8;
  for (int i = 0; i < whole; i += 8) _mm256_storeu_ps(out + i, widen_eight(in + i));
  widen_block<Float16>(in + whole, count - whole, out + whole);
}

inline void narrow_block(const float* in, int count, Float16* out) {
  const int whole = count - count % 8;
  for (int i = 0; i < whole; i += 8) narrow_eight(_mm256_loadu_ps(in + i), out + i);
  narrow_block<Float16>(in + whole, count - whole, out + whole);
}
#endif

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

  void prefetch(int64_t element, int count) const {
    const char* ahead = at(element) + kPrefetchBytes;
    const int bytes = count * itemsize;
#pragma GCC unroll 8
    for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
  }

  // `count` elements as float32, in `scratch`; and back again.
  void load(int64_t element, int count, float* scratch) const {
    visit_dtype(dtype,
                [&](auto type) { widen_block(reinterpret_cast<const decltype(type)*>(at(element)), count, scratch); });
  }
  void store(int64_t element, int count, const float* scratch) const {
    visit_dtype(dtype,
                [&](auto type) { narrow_block(scratch, count, reinterpret_cast<decltype(type)*>(at(element))); });
  }
};

int64_t row_of(int64_t desc) { return (desc >> 8) & 0xffffff; }
int64_t chunk_of(int64_t desc) { return desc >> 32; }

// Calls walk(t, first, end) for all chunks of the table, a few neighbours at a time, from all threads.
template <class F>
void walk_chunks(const Tables& t, int threads, Order order, const F& walk) {
  const int64_t per_piece = chunks_per_piece(t.chunks, threads);
  const auto work = [&](int64_t piece) { walk(t, piece * per_piece, std::min((piece + 1) * per_piece, t.chunks)); };
  run_pieces((t.chunks + per_piece - 1) / per_piece, threads, order,
             [](const void* context, int64_t piece) { (*static_cast<const decltype(work)*>(context))(piece); }, &work);
}

// The same, and before that open(row, memo) once for every row, by the thread that needs it: no other one waits. Only
// rows that several pieces share are opened before all.
template <class Open, class F>
void walk_rows(const Tables& t, int threads, Order order, const Open& open, const F& walk) {
  const int64_t per_piece = chunks_per_piece(t.chunks, threads);
  const auto shared = [&](int64_t chunk) {  // whether the row of the chunk before goes on here
    return chunk < t.chunks && row_of(t.desc[chunk - 1]) == row_of(t.desc[chunk]);
  };
  BiasCorrections memo{};
  int64_t opened = -1;
  for (int64_t chunk = per_piece; chunk < t.chunks; chunk += per_piece) {
    if (shared(chunk) && row_of(t.desc[chunk]) != opened) open(opened = row_of(t.desc[chunk]), memo);
  }
  if (t.chunks == 0) {
    for (int64_t row = 0; row < t.tensors; ++row) open(row, memo);
  }
  walk_chunks(t, threads, order, [&](const Tables&, int64_t first, int64_t end) {
    BiasCorrections own = memo;
    // Those that begin here, and those without elements before them.
    const int64_t end_row = end == t.chunks ? t.tensors : row_of(t.desc[end - 1]) + !shared(end);
    for (int64_t row = first == 0 ? 0 : row_of(t.desc[first - 1]) + 1; row < end_row; ++row) open(row, own);
    walk(t, first, end);
  });
}

}  // namespace
}  // namespace fused_optim::FUSED_ISA
