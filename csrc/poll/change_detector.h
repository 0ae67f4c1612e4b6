// The look before each step: has anything moved since the tables were built, and where do the gradients lie now?
#pragma once
#include <vector>

#include "dlpack.h"
#include "group_changes.h"
#include "poll.h"
#include "state_changes.h"

namespace fused_optim {

// Where torch keeps what a tensor's Python object points to. These addresses are asked for some rows ahead and never
// read: a stale one costs nothing, but one cache miss after the other would cost more than the whole step.
struct Hint {
  const void *object, *impl, *storage;
};

// A tensor as it was when the tables were built.
struct Place {
  Hint hint;
  const void* data;
  int ndim;
  DlType dtype;
  int bits;       // of complex tensors: is_conj, is_neg
  size_t layout;  // in `layouts_`: shape, then strides
};

// One row of the table.
struct WatchedRow {
  PyObject* param;
  py::object target;   // the memory that the kernel updates: the param, or its dense copy where the param has holes
  int64_t* grad_slot;  // this row's place in a table's `grads`
  DlType grad_dtype;
  DlDevice device;
  int first_place;  // in `places_`: the param, then the tensors among its states
  int places;
  int ndim;       // of param, target and gradient, or of their shards
  size_t layout;  // in `layouts_`: shape and strides of the target
  Hint grad;      // of the last gradient
  PyTypeObject* param_type;
  bool spread;      // the param is a DTensor
  py::object spec;  // of the last gradient that was spread as the param is
};

class ChangeDetector {
 public:
  // columns, deciding, raw, lr: as GroupChanges has them.
  ChangeDetector(py::list groups, py::dict state, const std::vector<ColumnSpec>& columns,
                 const std::vector<std::string>& deciding, py::object raw, py::object lr);

  // `pending` params have had no gradient yet; the first one to get one asks for new tables.
  void add_pending(py::object param);
  // The row's place in `grads` (int64, host) gets the address of its gradient, of this dtype. Of DTensors it is the
  // shards that are looked at. BufferError: torch cannot describe one of them by DLPack.
  void add_row(py::object param, py::object target, py::dict state, py::object grad_dtype, py::object grads,
               int64_t row);

  // Reads groups, params, states and gradients; writes raw, lr and the grad slots. Returns Answers, added up.
  int poll();

  // After a step: lets the gradients go, and tells autograd that the params have changed.
  void done();

 private:
  void add_place(py::handle tensor);
  size_t add_layout(const DlTensor& tensor, size_t guess);
  bool poll_places(const WatchedRow& row) const;
  bool same(const Place& place) const;
  void prefetch(size_t row) const;
  bool poll_grad(WatchedRow& row, int& answer);
  bool fits_target(const WatchedRow& row, const DlTensor& grad) const;
  bool plain(PyObject* tensor, const DlTensor& seen) const;
  int bits_of(PyObject* tensor, DlType dtype) const;
  py::object shard_of_grad(WatchedRow& row, py::object grad) const;

  GroupChanges groups_;
  StateChanges states_;
  std::vector<WatchedRow> rows_;
  std::vector<Place> places_;
  std::vector<int64_t> layouts_;
  std::vector<py::object> alive_;  // all that the raw pointers point to
  std::vector<py::object> pending_;
  std::vector<py::object> held_;  // gradients in use, so that nobody frees them while the GIL is released
  py::object stepped_;            // a list of the params that have gradients; None where it must be made anew
  Getter grad_{"grad"};
  Question is_conj_{"is_conj"}, is_neg_{"is_neg"};
  py::object tensor_class_, parameter_class_, increment_version_;
};

}  // namespace fused_optim
