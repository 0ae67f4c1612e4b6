// Rows with packed formats (../formats.h) on the GPU. Tables without packed formats use kernels without this code.
#pragma once
#include "../formats.h"
#include "walk.cuh"

namespace fused_optim {

// Without this nvcc does not unroll long loops, and puts the arrays that they index into memory.
#ifdef __CUDACC__
#define FUSED_UNROLL _Pragma("unroll")
#else
#define FUSED_UNROLL
#endif

// A stream that may have a packed format.
struct PackedStream {
  char *data, *low;
  Format format;
  int exponent;  // of the anchors
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

// The loads and stores of formats.cuh for packed streams. square: exp_avg_sq as it is stored, for anchored8.

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

// exp_avg is handled after exp_avg_sq, because anchored8 stores it relative to exp_avg_sq.
constexpr int in_order(int i, int count) { return i >= kStreamState0 ? count - 1 - (i - kStreamState0) : i; }

// One thread's share of one chunk of a row with packed streams.
template <Pass pass, class Rule, bool kAverages, int S>
FUSED_HD Sums update_packed_chunk(const Tables& t, int64_t row_number, int64_t chunk, bool unaligned, int thread) {
  constexpr int kAverage = kStreamState0 + S, kStreams = kAverage + kAverages, kPart = kAccess / sizeof(float);
  constexpr int V = kStreams - (pass == Pass::kApplyUpdate) <= 4 ? 8 : 4;  // elements that a thread handles at once
  const TensorScalars<float> h = scalars_of<pass, float>(t, row_number);
  const int64_t* row = t.rows + row_number * kRowWidth;
  const int64_t signature = row[kRowDtypeSignature], grad = t.grads[row_number];
  const int64_t begin = chunk * kChunk, left = row[kRowNumel] - begin;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  constexpr int kSquare = S > 1 ? kStreamState0 + 1 : kStreamParam;  // exp_avg_sq, if there is one
  PackedStream stream[kStreams];
  for (int i = 0; i < kStreams; ++i) {
    if (!reads(pass, i)) continue;
    const int place = i == kAverage ? kStreamEma : i;
    const int64_t address = i == kStreamGrad ? grad : row[address_column(place)];
    stream[i] = PackedStream(row, address, format_of(signature, place), place, begin);
  }
  // `unaligned` covers param, states and average.
  const bool aligned = !(reads(pass, kStreamParam) && unaligned) && !(reads(pass, kStreamGrad) && grad % kAccess != 0);
  const int vectored = aligned && h.cautious_decay == 0 ? count - count % V : 0;
  TensorScalars<float> usual = h;
  usual.cautious_decay = 0;
  Sums sums{};

  for (int piece = 0; piece < vectored; piece += kThreads * V) {
    const int first = piece + thread * V;
    if (first >= vectored) break;
    Pack<float, V> pack[kStreams];
    float x[kStreams][V];
    // All loads are issued before the first use.
    FUSED_UNROLL
    for (int i = 0; i < kStreams; ++i) {
      if (reads(pass, i)) load(stream[i], first, kPart, pack[i]);
    }
    FUSED_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      const int i = k < kAverage ? in_order(k, kAverage) : k;
      if (reads(pass, i)) unpack(stream[i], pack[i], x[kSquare], x[i]);
    }
    for (int v = 0; v < V; ++v) {
      float state[S > 0 ? S : 1];
      for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s][v];
      update_element<pass, Rule, float, S>(usual, x[kStreamParam][v], x[kStreamGrad][v], state);
      for (int s = 0; s < S; ++s) x[kStreamState0 + s][v] = state[s];
    }
    FUSED_UNROLL
    for (int k = 0; k < kAverage; ++k) {
      const int i = in_order(k, kAverage);
      if (!writes(pass, i)) continue;
      pack_up(stream[i], x[i], first, x[kSquare], pack[i]);
      store(stream[i], first, kPart, pack[i]);
      if (sums_up(pass) || (kAverages && i == kStreamParam) || (S > 1 && i == kSquare))
        unpack(stream[i], pack[i], x[kSquare], x[i]);
    }
    if constexpr (kAverages) {
      for (int v = 0; v < V; ++v) x[kAverage][v] = averaged(h, x[kAverage][v], x[kStreamParam][v]);
      pack_up(stream[kAverage], x[kAverage], first, x[kSquare], pack[kAverage]);
      store(stream[kAverage], first, kPart, pack[kAverage]);
    }
    for (int v = 0; v < V; ++v) {
      float state[S > 0 ? S : 1];
      for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s][v];
      measure_element<pass, Rule, float, S>(h, x[kStreamParam][v], x[kStreamGrad][v], state, sums);
    }
  }

  for (int element = vectored + thread; element < count; element += kThreads) {
    float x[kStreams], state[S > 0 ? S : 1];
    x[kSquare] = 0;
    FUSED_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      const int i = k < kAverage ? in_order(k, kAverage) : k;
      if (reads(pass, i)) x[i] = load_one(stream[i], element, x[kSquare]);
    }
    for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s];
    update_element<pass, Rule, float, S>(h, x[kStreamParam], x[kStreamGrad], state);
    for (int s = 0; s < S; ++s) x[kStreamState0 + s] = state[s];
    FUSED_UNROLL
    for (int k = 0; k < kAverage; ++k) {
      const int i = in_order(k, kAverage);
      if (!writes(pass, i)) continue;
      store_one(stream[i], element, x[i], x[kSquare]);
      if (sums_up(pass) || (kAverages && i == kStreamParam) || (S > 1 && i == kSquare))
        x[i] = load_one(stream[i], element, x[kSquare]);
    }
    if constexpr (kAverages) {
      store_one(stream[kAverage], element, averaged(h, x[kAverage], x[kStreamParam]), x[kSquare]);
    }
    for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s];
    measure_element<pass, Rule, float, S>(h, x[kStreamParam], x[kStreamGrad], state, sums);
  }
  return sums;
}

}  // namespace fused_optim
