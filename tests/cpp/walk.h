// The walker under test: walk_*.cpp says which. 0: done.
#pragma once
#include "../../csrc/tables.h"

extern const bool any_order;  // whether chunks may come in any

int walk_step(const char* rule, const fused_optim::Tables& t);
int walk_apply_update(const char* rule, const fused_optim::Tables& t);
double walk_squares(const fused_optim::Tables& t);
extern const double squares_error;  // of what they return, relative
void walk_scale(const fused_optim::Tables& t);
