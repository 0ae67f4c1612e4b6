// Distributes the chunks and rows of a table over the threads, for all passes of the CPU walker.
#pragma once
#include <algorithm>

#include "../dispatch.h"
#include "../prep.h"
#include "formats.h"
#include "threads.h"

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int64_t kRowsAhead = 4;   // prefetch distance of small rows, in chunks
constexpr int64_t kSmallRow = 256;  // elements of a row that is prefetched whole

// Prefetches the row of a chunk if it is small. Its loop prefetches nothing.
inline void prefetch_row(const Tables& t, int64_t chunk) {
  if (chunk >= t.chunks) return;
  const int64_t number = row_of(t.chunk_table[chunk]);
  const int64_t* row = t.rows + number * kRowWidth;
  __builtin_prefetch(reinterpret_cast<const void*>(row[kRowStep]), 1);
  const int64_t numel = row[kRowNumel], signature = row[kRowDtypeSignature];
  if (numel > kSmallRow) return;
  const auto prefetch = [&](int64_t address, int stream) {
    const int64_t bytes = numel * bytes_of(format_of(signature, stream));
    const char* at = reinterpret_cast<const char*>(address);
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte);
  };
  prefetch(row[kRowParam], kStreamParam);
  prefetch(t.grads[number], kStreamGrad);
  for (int stream = kStreamState0; format_of(signature, stream) != kAbsent; ++stream)
    prefetch(row[address_column(stream)], stream);
}

// Calls walk(t, first, end) for ranges of consecutive chunks that together are all chunks of the table, from all
// threads.
template <class F>
void walk_chunks(const Tables& t, int threads, Order order, const F& walk) {
  const int64_t per_piece = chunks_per_piece(t.chunks, threads);
  const auto work = [&](int64_t piece) { walk(t, piece * per_piece, std::min((piece + 1) * per_piece, t.chunks)); };
  run_pieces((t.chunks + per_piece - 1) / per_piece, threads, order,
             [](const void* context, int64_t piece) { (*static_cast<const decltype(work)*>(context))(piece); }, &work);
}

// The end of the chunks that belong to the same row as the first one. They are consecutive.
inline int64_t end_of_row(const Tables& t, int64_t first, int64_t end) {
  int64_t next = first + 1;
  while (next < end && row_of(t.chunk_table[next]) == row_of(t.chunk_table[first])) ++next;
  return next;
}

// Calls walk(first, end, scalars) for ranges of chunks of one row that together are all chunks of the table, from all
// threads. The thread that walks a row opens it first, so no thread waits for another: open(row, memo) is called once
// for every row and returns its scalars. Rows that span several pieces are opened by the calling thread beforehand, by
// store(row, memo), which puts their scalars into the table. Each thread has its own Memo.
template <class Memo, class Store, class Open, class F>
void walk_rows(const Tables& t, int threads, Order order, const Store& store, const Open& open, const F& walk) {
  const int64_t per_piece = chunks_per_piece(t.chunks, threads);
  const auto shared = [&](int64_t chunk) {  // whether this chunk and the one before belong to the same row
    return chunk < t.chunks && row_of(t.chunk_table[chunk - 1]) == row_of(t.chunk_table[chunk]);
  };
  Memo memo{};
  int64_t stored = -1;
  for (int64_t chunk = per_piece; chunk < t.chunks; chunk += per_piece) {
    if (shared(chunk) && row_of(t.chunk_table[chunk]) != stored) store(stored = row_of(t.chunk_table[chunk]), memo);
  }
  if (t.chunks == 0) {
    for (int64_t row = 0; row < t.tensors; ++row) open(row, memo);
  }
  walk_chunks(t, threads, order, [&](const Tables&, int64_t first, int64_t end) {
    Memo own = memo;
    int64_t opened = first == 0 ? -1 : row_of(t.chunk_table[first - 1]);
    bool begun = first > 0 && shared(first);
    for (int64_t chunk = first, next; chunk < end; chunk = next) {
      const int64_t row = row_of(t.chunk_table[chunk]);
      next = end_of_row(t, chunk, end);
      // Rows without elements have no chunks: the piece with the next row's first chunk opens them, or the last piece.
      while (opened + 1 < row) open(++opened, own);
      const bool in_table = begun || (next == end && shared(end));
      const double* scalars = in_table ? t.tensor_scalars + row * kScalarWidth : open(row, own);
      opened = row;
      begun = false;
      prefetch_row(t, next + kRowsAhead);
      walk(chunk, next, scalars);
    }
    if (end == t.chunks) {
      while (opened + 1 < t.tensors) open(++opened, own);
    }
  });
}

}  // namespace
}  // namespace fused_optim::FUSED_ISA
