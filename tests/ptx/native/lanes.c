// Operations that NumPy does not have: memory at one address per lane, and fused multiply-add.
#include <math.h>
#include <stdint.h>
#include <string.h>

void gather(int64_t lanes, const uint8_t* mask, const uint64_t* address, int64_t bytes, char* out) {
  for (int64_t i = 0; i < lanes; ++i)
    if (mask[i]) memcpy(out + i * bytes, (const void*)address[i], bytes);
}

void scatter(int64_t lanes, const uint8_t* mask, const uint64_t* address, int64_t bytes, const char* in) {
  for (int64_t i = 0; i < lanes; ++i)
    if (mask[i]) memcpy((void*)address[i], in + i * bytes, bytes);
}

void fma32(int64_t lanes, const float* a, const float* b, const float* c, float* out) {
  for (int64_t i = 0; i < lanes; ++i) out[i] = fmaf(a[i], b[i], c[i]);
}

void fma64(int64_t lanes, const double* a, const double* b, const double* c, double* out) {
  for (int64_t i = 0; i < lanes; ++i) out[i] = fma(a[i], b[i], c[i]);
}
