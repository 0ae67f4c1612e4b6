// The CPU walker's passes over gradients alone: their norm, and clipping them where they stand.
#include "grads.h"

#include "../prep.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int kLanes = 16;  // sums side by side: a single vector would wait for its own last addition

// The sum of the squares of one chunk's gradient.
double squares_of(const Tables& t, int64_t desc) {
  const int64_t row = (desc >> 8) & 0xffffff, begin = (desc >> 32) * kChunk;
  const double* raw = t.raw + int64_t{t.group[row]} * kRawWidth;
  if (t.grads[row] == 0 || raw[kMaxNorm] == 0.0) return 0.0;
  const int64_t* columns = t.rows + row * kRowWidth;
  const int count = static_cast<int>(std::min<int64_t>(kChunk, columns[kNumel] - begin));
  const Stream grad(t.grads[row], columns[kSignature], 1);
  const auto sum = [&](auto type) {
    const auto* x = reinterpret_cast<const decltype(type)*>(grad.at(begin));
    double part[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const double wide = widen(x[i + lane]);
        part[lane] += wide * wide;
      }
    }
    double total = 0.0;
    for (; i < count; ++i) {
      const double wide = widen(x[i]);
      total += wide * wide;
    }
    for (double sum : part) total += sum;
    return total;
  };
  const double counted = raw[kMaxNorm] > 0.0 ? 1.0 : 0.0;
  double total = 0.0;
  if (grad.dtype == kFloat64) return sum(double{}) * counted;
  visit_dtype(grad.dtype, [&](auto type) { total = sum(type); });
  return total * counted;
}

// Where the factor is 1 nothing is read, and nothing written.
template <class T, class G>
void scale_block(T factor, G* grad, int count) {
  if (factor == T(1)) return;
#pragma omp simd
  for (int i = 0; i < count; ++i) narrow(widen(grad[i]) * factor, grad[i]);
}

#ifdef __F16C__
// With the processor's own conversions, which the compiler does not think of: some eight times as fast as by bits.
void scale_block(float factor, Float16* grad, int count) {
  if (factor == 1.0f) return;
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    auto* eight = reinterpret_cast<__m128i*>(grad + i);
    const __m256 scaled = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128(eight)), _mm256_set1_ps(factor));
    _mm_storeu_si128(eight, _mm256_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
  }
  scale_block<float, Float16>(factor, grad + i, count - i);
}
#endif

// One chunk's gradient becomes what clipping makes of it.
void scale_chunk(const Tables& t, int64_t desc) {
  const int64_t row = (desc >> 8) & 0xffffff, begin = (desc >> 32) * kChunk;
  if (t.grads[row] == 0) return;
  const double factor = clip_coefficient(t.raw + int64_t{t.group[row]} * kRawWidth, *t.squares, 1.0);
  const int64_t* columns = t.rows + row * kRowWidth;
  const int count = static_cast<int>(std::min<int64_t>(kChunk, columns[kNumel] - begin));
  const Stream grad(t.grads[row], columns[kSignature], 1);
  if (grad.dtype == kFloat64) return scale_block(factor, reinterpret_cast<double*>(grad.at(begin)), count);
  visit_dtype(grad.dtype, [&](auto type) {
    scale_block(static_cast<float>(factor), reinterpret_cast<decltype(type)*>(grad.at(begin)), count);
  });
}

}  // namespace

double squares(const Tables& t, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, grain(t, threads))
  for (int64_t i = 0; i < t.chunks; ++i) t.partials[i] = squares_of(t, t.desc[i]);
  double total = 0.0;
  for (int64_t i = 0; i < t.chunks; ++i) total += t.partials[i];  // in this order, whatever the threads did
  return total;
}

void scale(const Tables& t, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, grain(t, threads))
  for (int64_t i = 0; i < t.chunks; ++i) scale_chunk(t, t.desc[i]);
}

}  // namespace fused_optim::FUSED_ISA
