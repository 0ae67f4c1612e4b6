// Rules: the arithmetic of each optimizer, on values. Rules use no pointers, torch or CUDA headers, so g++ and nvcc
// compile the same code. A rule gets the scalars of the tensor, and the param, the gradient and the S states of one
// element. It changes the states and returns the update that the walker subtracts from the param. T is float, or double
// for float64 tensors.
//
// A rule with `trust` is walked twice, because the update of each tensor is multiplied by a ratio that depends on the
// whole tensor. The first walk calls `update_moments`, which changes the states, and sums the squares of the two
// numbers that `measure` makes of each element. `ratio` makes the ratio of both sums. In the second walk `direction`
// computes the update from the states alone, before lr and decay. `scales_decay`: whether the ratio multiplies
// decoupled decay, too.
//
// A rule declares its minimum and maximum number of states, and how many of its states can be negative. Those come
// first. A rule can have a function `scalars`, which computes the rule's own scalars from the options of the tensor's
// group. A rule that declares a number of `running` scalars gets these as a third argument of `scalars`, which may
// change them: numbers of the tensor that carry over from step to step.
#pragma once
#include <cstring>

#include "../arithmetic.h"

namespace fused_optim {

// A rule's own scalars. Its function `scalars` computes them in double precision, once per tensor and step. The rule
// reads them as own_a to own_f.
struct OwnScalars {
  double a = 0.0, b = 0.0, c = 0.0, d = 0.0, e = 0.0, f = 0.0;
};

// Two numbers of an element, whose squares are summed over its tensor.
template <class T>
struct Measured {
  T first, second;
};

// The step of a tensor, counted from 1, and 1 - beta**step of the betas.
struct BiasCorrections {
  double beta1, beta2, beta3, step, correction1, correction2, correction3;
};

template <class T>
struct Tag {
  using type = T;
};

template <class... Rules>
struct RuleList {
  template <class F>
  static bool visit(const char* name, F&& f) {
    return ((std::strcmp(name, Rules::name) == 0 && (f(Tag<Rules>{}), true)) || ...);
  }

  template <class F>
  static void each(F&& f) {
    (f(Tag<Rules>{}), ...);
  }
};

template <class... Lists>
struct Join;

template <class... Rules>
struct Join<RuleList<Rules...>> {
  using type = RuleList<Rules...>;
};

template <class... First, class... Second, class... More>
struct Join<RuleList<First...>, RuleList<Second...>, More...> : Join<RuleList<First..., Second...>, More...> {};

// The rules of several lists in one list.
template <class... Lists>
using Joined = typename Join<Lists...>::type;

}  // namespace fused_optim
