// What the memory allows: the passes that benchmarks hold the step against.
#pragma once
#include <cstdint>
#include <vector>

namespace fused_optim {

constexpr int kProbeWritten = 8, kProbeRead = 4;  // at most so many streams

// One set of streams of as many bytes each: first those that are read and written, then those that are read.
struct ProbeRow {
  std::vector<char*> streams;
  int64_t bytes;
};

// What one turn takes: some bytes of each stream of a row.
struct ProbeSpan {
  const ProbeRow* row;
  int64_t begin, end;
};

// How a pass goes over memory. piece: bytes of each stream that a thread takes at a time, as they come; 0: each thread
// has one contiguous share. prefetch: bytes ahead that are asked for, 0 for none.
struct ProbePattern {
  int64_t piece;
  int threads;
  int prefetch;
};

inline std::vector<ProbeSpan> probe_spans(const std::vector<ProbeRow>& rows, int64_t piece) {
  constexpr int64_t kLeast = 16384;  // of which contiguous shares are made
  if (piece == 0) piece = kLeast;
  std::vector<ProbeSpan> spans;
  for (const ProbeRow& row : rows) {
    for (int64_t begin = 0; begin < row.bytes; begin += piece)
      spans.push_back({&row, begin, begin + piece < row.bytes ? begin + piece : row.bytes});
  }
  return spans;
}

}  // namespace fused_optim
