// Formats on the GPU. All loads and stores of values are here. A thread accesses 16 bytes of every stream at a time:
// `load` and `store` move the words of V elements, `unpack` and `pack_up` convert them. `load_one` and `store_one` do
// both for one element. A new format needs a branch in each pair, and its bytes in fused_optim/engine/layout.py.
#pragma once
#include <cassert>

#include "../convert.h"
#include "../dispatch.h"

namespace fused_optim {

constexpr int kAccess = kAlignment;  // bytes, the widest load and store

// The number of elements of each stream that a thread handles at once. kStored: the format of all streams; kAbsent if
// they differ. Eight fill a 16-byte access of every dtype. With more than four streams eight would need too many
// registers, except for bfloat16.
template <class T, int kStored, int kStreams>
constexpr int kVector = sizeof(T) == 8 ? 2 : (kStreams <= 4 || kStored == kBfloat16 ? 8 : 4);

// One chunk of one tensor of a row.
struct Stream {
  char* data;
  Format format;

  FUSED_HD Stream() {}
  FUSED_HD Stream(char* data, Format format) : data(data), format(format) {}
  FUSED_HD Stream(int64_t address, Format format, int64_t begin) : format(format) {
    data = reinterpret_cast<char*>(address + begin * bytes());
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(data));  // without this every access would be a generic one
#endif
  }

  FUSED_HD int bytes() const {
    return format == kFloat64 ? kBytesFloat64 : format == kFloat32 ? kBytesFloat32 : kBytesFloat16;
  }
  FUSED_HD char* at(int element) const { return data + element * bytes(); }
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

// V elements of one tensor as stored. Two-byte dtypes fill the first half of the words.
template <class T, int V>
struct Pack {
  uint32_t word[V * sizeof(T) / 4];
};

// V elements from `first` on. Elements as wide as T are accessed in parts of 16 bytes, `gap` elements apart.
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

}  // namespace fused_optim
