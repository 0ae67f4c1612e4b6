// The walker under test, which walk_*.cpp selects. Functions that return int return 0 on success.
#pragma once
#include "../../csrc/tables.h"

extern const bool any_order;  // whether the chunks of the table can be in any order

int walk_step(const char* rule, const fused_optim::Tables& t);
int walk_apply_update(const char* rule, const fused_optim::Tables& t);
double walk_squares(const fused_optim::Tables& t);
extern const double squares_error;  // relative error of walk_squares
void walk_scale(const fused_optim::Tables& t);
