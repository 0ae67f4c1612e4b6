// What the memory allows: the ceiling that benchmarks hold the step against.
#pragma once
#include <cstdint>
#include <vector>

namespace fused_optim {

constexpr int kFloorWritten = 8, kFloorRead = 4;  // at most so many streams

// One set of streams of as many bytes each: first those that are read and written, then those that are read.
struct FloorRow {
  std::vector<char*> streams;
  int64_t bytes;
};

// What one turn takes.
struct FloorSpan {
  const FloorRow* row;
  int64_t begin;
};

std::vector<FloorSpan> floor_spans(const std::vector<FloorRow>& rows);

// A pass with the reads and writes of a step and no arithmetic, in one parallel region. False where there are none or
// too many streams.
bool floor_pass(const std::vector<FloorSpan>& spans, int written, int read, int threads);

}  // namespace fused_optim
