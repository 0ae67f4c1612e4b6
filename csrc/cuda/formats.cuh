// Formats on the GPU: the only loads and stores of values. A thread takes 16 bytes at a time of every stream: `load`
// and `store` move the words of V elements, `unpack` and `pack_up` make values of them; `load_one` and `store_one` do
// both for one element. A new format needs a branch in each pair, and its bytes in fused_optim/engine/layout.py.
#pragma once
#include <cassert>

#include "../convert.h"
#include "../dispatch.h"
#include "../formats.h"

namespace fused_optim {

// Left to itself nvcc keeps long loops, and puts the arrays that they index into memory.
#ifdef __CUDACC__
#define FUSED_UNROLL _Pragma("unroll")
#else
#define FUSED_UNROLL
#endif

constexpr int kAccess = kAlignment;  // bytes, the widest load and store

// Elements that a thread takes at once of each of so many streams. Eight fill a 16-byte access of every dtype; of more
// than four streams they would crowd the registers of all kinds, for one kernel serves them all.
template <class T, int kStreams>
constexpr int kVector = sizeof(T) == 8 ? 2 : (kStreams <= 4 ? 8 : 4);

// One chunk of one tensor of a row.
struct Stream {
  char* data;
  Format format;

  FUSED_HD Stream() {}
  FUSED_HD Stream(char* data, Format format) : data(data), format(format) {}
  FUSED_HD Stream(const int64_t* /*row*/, int64_t address, Format format, int /*place*/, int64_t begin)
      : Stream(address, format, begin) {}
  FUSED_HD Stream(int64_t address, Format format, int64_t begin) : format(format) {
    data = reinterpret_cast<char*>(address + begin * bytes());
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(data));  // unsaid, every access would be a generic one
#endif
  }

  FUSED_HD int bytes() const {
    return format == kFloat64 ? kBytesFloat64 : format == kFloat32 ? kBytesFloat32 : kBytesFloat16;
  }
  FUSED_HD char* at(int element) const { return data + element * bytes(); }
};

// A stream that may have a packed format. Tables without any have kernels of their own, which know nothing of it.
struct PackedStream {
  char *data, *low;
  Format format;
  int exponent;  // of anchors
  Thresholds thresholds;

  FUSED_HD PackedStream() {}
  FUSED_HD PackedStream(const int64_t* row, int64_t address, Format format, int stream, int64_t begin)
      : format(format), exponent(static_cast<int>(row[kRowAnchor])) {
    data = reinterpret_cast<char*>(address + begin * bytes());
    low = reinterpret_cast<char*>(row[kRowParamLow] + begin * low_bytes());
    if (stream != kStreamGrad) thresholds = thresholds_of(row, stream, begin);
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(data));
    if (low_bytes() != 0) __builtin_assume(__isGlobal(low));
#endif
  }

  FUSED_HD int bytes() const { return bytes_of(format); }
  FUSED_HD int low_bytes() const { return format == kSplit16 ? 2 : format == kSplit8 ? 1 : 0; }
  FUSED_HD char* at(int element) const { return data + element * bytes(); }
  FUSED_HD char* low_at(int element) const { return low + element * low_bytes(); }
};

// Words (4, 2 or 1) of aligned global memory in one access. In PTX, because nvcc splits a memcpy, and at times a uint4.
template <int kWords>
FUSED_HD void load_words(const char* from, uint32_t* word) {
#ifdef __CUDA_ARCH__
  if constexpr (kWords == 4) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "l"(from)
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(from) : "memory");
  } else {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(word[0]) : "l"(from) : "memory");
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
  } else if constexpr (kWords == 2) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(word[0]), "r"(word[1]) : "memory");
  } else {
    asm volatile("st.global.u32 [%0], %1;" : : "l"(to), "r"(word[0]) : "memory");
  }
#else
  assert(reinterpret_cast<uintptr_t>(to) % (4 * kWords) == 0);
  std::memcpy(to, word, 4 * kWords);
#endif
}

// V elements of one tensor as they lie in memory; two-byte dtypes fill the first half of the words, and lower halves
// follow there.
template <class T, int V>
struct Pack {
  uint32_t word[V * sizeof(T) / 4];
};

// V elements from `first` on. Those as wide as T come in parts of 16 bytes, each starting `gap` elements past the last.
template <class T, int V>
FUSED_HD void load(const Stream& stream, int first, int gap, Pack<T, V>& pack) {
  constexpr int kParts = V * sizeof(T) / kAccess;
  if (sizeof(T) == 8 || stream.format == kFloat32) {
    for (int i = 0; i < kParts; ++i) load_words<4>(stream.at(first + i * gap), pack.word + 4 * i);
  } else {
    load_words<2 * kParts>(stream.at(first), pack.word);
  }
}

template <class T, int V>
FUSED_HD void unpack(const Pack<T, V>& pack, Format format, T (&x)[V]) {
  if (sizeof(T) == 8 || format == kFloat32) {
    std::memcpy(x, pack.word, sizeof x);
    return;
  }
  if (format == kBfloat16) {  // one instruction for each: bfloat16 is the upper half of a float
    for (int v = 0; v < V; v += 2) {
      x[v] = bits_float(pack.word[v / 2] << 16);
      x[v + 1] = bits_float(pack.word[v / 2] & 0xffff0000u);
    }
    return;
  }
  uint16_t half[V];
  std::memcpy(half, pack.word, sizeof half);
  for (int v = 0; v < V; ++v) x[v] = f16_to_float(half[v]);
}

// Two floats in one word, the first in its lower half: one instruction of the GPU, too.
FUSED_HD uint32_t bf16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
#endif
}

FUSED_HD uint32_t f16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return float_to_f16(low) | static_cast<uint32_t>(float_to_f16(high)) << 16;
#endif
}

template <class T, int V>
FUSED_HD void pack_up(const T (&x)[V], Format format, Pack<T, V>& pack) {
  if constexpr (sizeof(T) == 4) {
    if (format != kFloat32) {
      for (int v = 0; v < V; v += 2)
        pack.word[v / 2] = format == kBfloat16 ? bf16_pair(x[v], x[v + 1]) : f16_pair(x[v], x[v + 1]);
      return;
    }
  }
  std::memcpy(pack.word, x, sizeof x);
}

template <class T, int V>
FUSED_HD void store(const Stream& stream, int first, int gap, const Pack<T, V>& pack) {
  constexpr int kParts = V * sizeof(T) / kAccess;
  if (sizeof(T) == 8 || stream.format == kFloat32) {
    for (int i = 0; i < kParts; ++i) store_words<4>(stream.at(first + i * gap), pack.word + 4 * i);
  } else {
    store_words<2 * kParts>(stream.at(first), pack.word);
  }
}

template <class T>
FUSED_HD T load_one(const Stream& stream, int element) {
  const char* from = stream.at(element);
  if constexpr (sizeof(T) == 8) return *reinterpret_cast<const double*>(from);
  if (stream.format == kFloat32) return *reinterpret_cast<const float*>(from);
  const uint16_t half = *reinterpret_cast<const uint16_t*>(from);
  return stream.format == kBfloat16 ? bf16_to_float(half) : f16_to_float(half);
}

template <class T>
FUSED_HD void store_one(const Stream& stream, int element, T x) {
  char* to = stream.at(element);
  if constexpr (sizeof(T) == 8) *reinterpret_cast<double*>(to) = x;
  else if (stream.format == kFloat32) *reinterpret_cast<float*>(to) = x;
  else *reinterpret_cast<uint16_t*>(to) = stream.format == kBfloat16 ? float_to_bf16(x) : float_to_f16(x);
}

// By the stream, as the walker asks for it. Plain streams need no more than their format.
template <class T, int V>
FUSED_HD void unpack(const Stream& stream, const Pack<T, V>& pack, const T* /*square*/, T (&x)[V]) {
  unpack(pack, stream.format, x);
}

template <class T, int V>
FUSED_HD void pack_up(const Stream& stream, const T (&x)[V], int /*first*/, const T* /*square*/, Pack<T, V>& pack) {
  pack_up(x, stream.format, pack);
}

template <class T>
FUSED_HD T load_one(const Stream& stream, int element, const T& /*square*/) {
  return load_one<T>(stream, element);
}

template <class T>
FUSED_HD void store_one(const Stream& stream, int element, T x, const T& /*square*/) {
  store_one<T>(stream, element, x);
}

// The same of packed streams. square: exp_avg_sq as it is stored, for anchored8.

template <int V>
FUSED_HD void load(const PackedStream& stream, int first, int gap, Pack<float, V>& pack) {
  if (!is_packed(stream.format) || stream.bytes() == 2) {
    const Stream plain{stream.data, stream.format == kFloat32 ? kFloat32 : kBfloat16};
    load<float, V>(plain, first, gap, pack);
  } else {
    load_words<V / 4>(stream.at(first), pack.word);
  }
  if (stream.format == kSplit16) load_words<V / 2>(stream.low_at(first), pack.word + V / 2);
  if (stream.format == kSplit8) load_words<V / 4>(stream.low_at(first), pack.word + V / 2);
}

template <int V>
FUSED_HD void store(const PackedStream& stream, int first, int gap, const Pack<float, V>& pack) {
  if (!is_packed(stream.format) || stream.bytes() == 2) {
    const Stream plain{stream.data, stream.format == kFloat32 ? kFloat32 : kBfloat16};
    store<float, V>(plain, first, gap, pack);
  } else {
    store_words<V / 4>(stream.at(first), pack.word);
  }
  if (stream.format == kSplit16) store_words<V / 2>(stream.low_at(first), pack.word + V / 2);
  if (stream.format == kSplit8) store_words<V / 4>(stream.low_at(first), pack.word + V / 2);
}

FUSED_HD uint32_t half_of(const uint32_t* word, int i) { return (word[i / 2] >> (16 * (i % 2))) & 0xffffu; }
FUSED_HD uint32_t byte_of(const uint32_t* word, int i) { return (word[i / 4] >> (8 * (i % 4))) & 0xffu; }
FUSED_HD void put_half(uint32_t* word, int i, uint32_t half) {
  word[i / 2] = i % 2 == 0 ? half : word[i / 2] | half << 16;
}
FUSED_HD void put_byte(uint32_t* word, int i, uint32_t byte) {
  word[i / 4] = i % 4 == 0 ? byte : word[i / 4] | byte << (8 * (i % 4));
}

template <int V>
FUSED_HD void unpack(const PackedStream& stream, const Pack<float, V>& pack, const float* square, float (&x)[V]) {
  const uint32_t *word = pack.word, *low = pack.word + V / 2;
  switch (stream.format) {
    case kSplit16:
      FUSED_UNROLL
      for (int v = 0; v < V; ++v) x[v] = join_halves(half_of(word, v), static_cast<int16_t>(half_of(low, v)));
      break;
    case kSplit8:
      FUSED_UNROLL
      for (int v = 0; v < V; ++v) x[v] = join_quarter(half_of(word, v), static_cast<int8_t>(byte_of(low, v)));
      break;
    case kE8m8:
      FUSED_UNROLL
      for (int v = 0; v < V; ++v) x[v] = decode_e8m8(half_of(word, v));
      break;
    case kAnchored8:
      FUSED_UNROLL
      for (int v = 0; v < V; ++v) x[v] = decode_anchored8(byte_of(word, v), square[v], stream.exponent);
      break;
    default:
      unpack<float, V>(pack, stream.format == kBfloat16Dithered ? kBfloat16 : stream.format, x);
  }
}

template <int V>
FUSED_HD void pack_up(const PackedStream& stream, const float (&x)[V], int first, const float* square,
                      Pack<float, V>& pack) {
  uint32_t *word = pack.word, *low = pack.word + V / 2;
  const Thresholds at = stream.thresholds;
  switch (stream.format) {
    case kBfloat16Dithered:
      FUSED_UNROLL
      for (int v = 0; v < V; ++v) put_half(word, v, encode_bf16(x[v], at[first + v]));
      break;
    case kSplit16:
      FUSED_UNROLL
      for (int v = 0; v < V; ++v) {
        put_half(word, v, upper_half(x[v]));
        put_half(low, v, static_cast<uint16_t>(lower_half(x[v])));
      }
      break;
    case kSplit8:
      FUSED_UNROLL
      for (int v = 0; v < V; ++v) {
        put_half(word, v, upper_half(x[v]));
        put_byte(low, v, static_cast<uint8_t>(lower_quarter(x[v], at[first + v])));
      }
      break;
    case kE8m8:
      FUSED_UNROLL
      for (int v = 0; v < V; ++v) put_half(word, v, encode_e8m8(x[v], at[first + v]));
      break;
    case kAnchored8:
      FUSED_UNROLL
      for (int v = 0; v < V; ++v) put_byte(word, v, encode_anchored8(x[v], square[v], stream.exponent, at[first + v]));
      break;
    default:
      pack_up<float, V>(x, stream.format, pack);
  }
}

template <class T>
FUSED_HD float load_one(const PackedStream& stream, int element, const float& square) {
  const char *from = stream.at(element), *low = stream.low_at(element);
  const auto half = [&] { return *reinterpret_cast<const uint16_t*>(from); };
  switch (stream.format) {
    case kBfloat16Dithered:
      return bf16_to_float(half());
    case kSplit16:
      return join_halves(half(), *reinterpret_cast<const int16_t*>(low));
    case kSplit8:
      return join_quarter(half(), *reinterpret_cast<const int8_t*>(low));
    case kE8m8:
      return decode_e8m8(half());
    case kAnchored8:
      return decode_anchored8(*reinterpret_cast<const uint8_t*>(from), square, stream.exponent);
    default:
      return load_one<float>(Stream{stream.data, stream.format}, element);
  }
}

FUSED_HD void store_one(const PackedStream& stream, int element, float x, const float& square) {
  char *to = stream.at(element), *low = stream.low_at(element);
  const uint32_t at = stream.thresholds[element];
  switch (stream.format) {
    case kBfloat16Dithered:
      *reinterpret_cast<uint16_t*>(to) = encode_bf16(x, at);
      break;
    case kSplit16:
      *reinterpret_cast<uint16_t*>(to) = upper_half(x);
      *reinterpret_cast<int16_t*>(low) = lower_half(x);
      break;
    case kSplit8:
      *reinterpret_cast<uint16_t*>(to) = upper_half(x);
      *reinterpret_cast<int8_t*>(low) = lower_quarter(x, at);
      break;
    case kE8m8:
      *reinterpret_cast<uint16_t*>(to) = encode_e8m8(x, at);
      break;
    case kAnchored8:
      *reinterpret_cast<uint8_t*>(to) = encode_anchored8(x, square, stream.exponent, at);
      break;
    default:
      store_one<float>(Stream{stream.data, stream.format}, element, x);
  }
}

}  // namespace fused_optim
