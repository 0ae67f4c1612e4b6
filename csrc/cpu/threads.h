// Distributes a pass over the threads of torch's OpenMP.
#pragma once
#include <cstdint>

namespace fused_optim {

// Returns 1 if a second thread saves no time, else `most`. Never a number between: OpenMP ends the threads that a
// smaller team does not use, and torch's next operation would have to start them again.
int threads_for(int64_t elements, int64_t chunks, int most);

// Chunks of the table in one piece of work.
int64_t chunks_per_piece(int64_t chunks, int threads);

enum class Order { kForward, kBackward };  // order of the pieces in each thread's own share

// Calls work(context, piece) once for each piece in [0, pieces). Each thread has a share of consecutive pieces and
// takes them in order. A thread without pieces steals the far half of the largest remaining share. So no thread waits
// for one that has not begun, and the threads synchronize only once, at the end. If that wait recently took longer than
// the other threads save, the calling thread does all pieces alone.
void run_pieces(int64_t pieces, int threads, Order order, void (*work)(const void* context, int64_t piece),
                const void* context);

}  // namespace fused_optim
