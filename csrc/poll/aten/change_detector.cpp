#include "change_detector.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>

#include "../../cpu/threads.h"
#include "../../tables.h"

namespace fused_optim {
namespace {

bool wraps(const at::Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Python); }

// Whether the tensor is a DTensor.
bool is_spread(py::handle tensor) {
  return wraps(unpack(tensor)) && PyObject_HasAttr(tensor.ptr(), name_of_shard()) == 1;
}

// Strides of dimensions with one element do not matter.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (x[d] != y[d] && sizes[d] != 1) return false;
  }
  return true;
}

// Whether the numbers in memory are the tensor's values.
bool plain(const at::Tensor& t) { return !t.is_conj() && !t.is_neg() && !t._is_zerotensor(); }

// False if the elements have no memory. torch's zero tensors and tensors without elements need none.
bool has_memory(const at::Tensor& t) {
  return t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl()->data() != nullptr || t.numel() == 0 ||
         t._is_zerotensor();
}

// Prefetches the bytes from `first` to `last` of an object, which are in one line or in two.
void prefetch_bytes(const void* object, int first, int last) {
  __builtin_prefetch(static_cast<const char*>(object) + first);
  __builtin_prefetch(static_cast<const char*>(object) + last);
}

// Prefetches what `same` reads. The numbers are offsets in torch's TensorImpl and StorageImpl. A TensorImpl spans three
// or four cache lines: its use count and storage are near the start, then sizes and strides, then numel, dtype, flags.
void prefetch_tensor(const void* impl, const void* storage) {
  __builtin_prefetch(static_cast<const char*>(impl) + 16);
  prefetch_bytes(impl, 152, 176);
  __builtin_prefetch(static_cast<const char*>(storage) + 16);
}
void prefetch_sizes(const void* impl) { prefetch_bytes(impl, 64, 88); }

constexpr size_t kPieceRows = 64;  // rows that a thread polls at a time

}  // namespace

ChangeDetector::ChangeDetector(py::list groups, py::dict state, const std::vector<ColumnSpec>& columns,
                               const std::vector<std::string>& deciding, py::object raw, py::object lr)
    : groups_(std::move(groups), columns, deciding, std::move(raw), std::move(lr)), states_(std::move(state)) {}

void ChangeDetector::add_pending(py::object param) { pending_.push_back(std::move(param)); }

void ChangeDetector::add_guarded(py::object tensor) {
  versions_.push_back(unpack(tensor)._version());
  guarded_.push_back(std::move(tensor));
}

void ChangeDetector::add_row(py::object param, py::object target, py::dict state, at::ScalarType grad_dtype,
                             at::Tensor grads, int64_t number) {
  PolledRow row{};
  row.param = param.ptr();
  row.target = target.ptr();
  row.impl = unpack(param).unsafeGetTensorImpl();
  row.grad_slot = grads.mutable_data_ptr<int64_t>() + number;
  row.grad_dtype = grad_dtype;
  row.first_place = static_cast<int>(places_.size());
  row.spread = is_spread(param);
  row.wraps = wraps(unpack(param));
  row.inference = unpack(param).is_inference();
  add_place(param, true);
  for (const auto& item : state) {
    if (!THPVariable_Check(item.second.ptr())) continue;
    row.wraps |= wraps(unpack(item.second));
    add_place(item.second, false);
  }
  row.places = static_cast<int>(places_.size()) - row.first_place;
  row.autograd_meta = torch::autograd::impl::get_autograd_meta(unpack(param));
  // A VariableVersion is one pointer.
  row.version = *reinterpret_cast<const void* const*>(&row.impl->version_counter());
  elements_ += places_[row.first_place].numel;
  alive_.push_back(std::move(param));
  alive_.push_back(std::move(target));
  states_.add(std::move(state));
  alive_tensors_.push_back(std::move(grads));
  rows_.push_back(std::move(row));
}

void ChangeDetector::add_place(py::handle object, bool of_param) {
  if (is_spread(object)) {
    object = states_.add_shard(object);
    of_param = false;
  }
  const at::Tensor& tensor = unpack(object);
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  int strides = -1;
  if (!tensor.is_contiguous()) {
    strides = static_cast<int>(strides_.size());
    strides_.push_back(tensor.strides().vec());
  }
  places_.push_back({impl, storage, storage->data(), impl->storage_offset(), impl->numel(), tensor.scalar_type(),
                     tensor.is_conj(), tensor.is_neg(), strides});
  // No C++ reference to a param, see PolledRow. Before poll_places reads these addresses of a param, it checks that the
  // param is still the same tensor.
  if (!of_param) alive_tensors_.push_back(tensor);
}

bool ChangeDetector::same(const Place& place) const {
  const c10::TensorImpl& impl = *place.impl;
  return impl.is_conj() == place.conj && impl.is_neg() == place.neg &&
         impl.unsafe_storage().unsafeGetStorageImpl() == place.storage && place.storage->data() == place.data &&
         impl.storage_offset() == place.offset && impl.numel() == place.numel &&
         c10::typeMetaToScalarType(impl.dtype()) == place.dtype && impl.is_contiguous() == (place.strides < 0) &&
         (place.strides < 0 || impl.strides().equals(strides_[place.strides]));
}

int ChangeDetector::poll() {
  int answer = 0;
  held_.resize(rows_.size());
  if (!groups_.poll(answer)) return kRebuild;
  for (const py::object& param : pending_) {
    if (unpack(param).grad().defined()) return kRebuild;
  }
  if (!states_.poll()) return kRebuild;
  for (size_t i = 0; i < guarded_.size(); ++i) {
    if (unpack(guarded_[i])._version() != versions_[i]) return kRebuild;
  }

  // All threads poll pieces of the rows. A piece that they cannot decide is polled once more, by this thread.
  const auto rows = static_cast<int64_t>(rows_.size());
  const auto first_of = [&](int64_t piece) { return std::min(static_cast<size_t>(piece) * kPieceRows, rows_.size()); };
  std::vector<char> undecided((rows_.size() + kPieceRows - 1) / kPieceRows);
  std::atomic<int> found{0};
  const auto work = [&](int64_t piece) {
    int seen = 0;
    undecided[piece] = !poll_unchanged(first_of(piece), first_of(piece + 1), seen);
    if (seen != 0) found.fetch_or(seen, std::memory_order_relaxed);
  };
  const int threads = threads_for(elements_, rows, at::in_parallel_region() ? 1 : at::get_num_threads());
  run_pieces(
      static_cast<int64_t>(undecided.size()), threads, Order::kForward,
      [](const void* context, int64_t piece) { (*static_cast<const decltype(work)*>(context))(piece); }, &work);
  answer |= found;
  for (size_t piece = 0; piece < undecided.size(); ++piece) {
    if (!undecided[piece]) continue;
    for (size_t number = first_of(piece); number < first_of(piece + 1); ++number) {
      prefetch(number + kAhead);
      if (!poll_row(number, answer)) return kRebuild;
    }
  }
  return answer;
}

bool ChangeDetector::poll_unchanged(size_t first, size_t end, int& answer) {
  for (size_t ahead = first; ahead < first + kAhead; ++ahead) prefetch(ahead);
  for (size_t number = first; number < end; ++number) {
    prefetch(number + kAhead);
    if (!poll_unchanged(number, answer)) return false;
  }
  return true;
}

bool ChangeDetector::poll_unchanged(size_t number, int& answer) {
  const PolledRow& row = rows_[number];
  if (row.wraps || !states_.has_same_version(number) || !poll_places(row)) return false;
  const at::Tensor &param = unpack(row.param), &grad = param.unsafeGetTensorImpl()->grad();
  if (!grad.defined()) {
    hold(number, at::Tensor(), answer);
    return true;
  }
  // wraps() comes before sizes(), which calls Python for some subclasses. Only such subclasses and nested tensors have
  // no layout of strides that can be compared here.
  if (wraps(grad) || grad.is_nested() || grad.layout() != at::kStrided || grad.scalar_type() != row.grad_dtype ||
      grad.device() != param.device() || grad.sizes() != param.sizes() || !has_memory(grad) || !plain(grad) ||
      !same_layout(grad, unpack(row.target))) {
    return false;
  }
  hold(number, grad, answer);
  return true;
}

bool ChangeDetector::poll_row(size_t number, int& answer) {
  return states_.poll(number) && poll_places(rows_[number]) && poll_grad(number, answer);
}

void ChangeDetector::prefetch(size_t number) const {
  if (number >= rows_.size()) return;
  const PolledRow& row = rows_[number];
  __builtin_prefetch(reinterpret_cast<const char*>(row.param) + 16);
  for (int i = 0; i < row.places; ++i) {
    const Place& place = places_[row.first_place + i];
    prefetch_tensor(place.impl, place.storage);
  }
  prefetch_sizes(row.impl);
  prefetch_bytes(row.autograd_meta, 0, 40);
  __builtin_prefetch(reinterpret_cast<const char*>(row.grad) + 8);
  prefetch_tensor(row.grad, row.grad_storage);
  prefetch_sizes(row.grad);
  states_.prefetch(number);
}

bool ChangeDetector::poll_places(const PolledRow& row) const {
  if (unpack(row.param).unsafeGetTensorImpl() != row.impl) return false;
  for (int i = 0; i < row.places; ++i) {
    if (!same(places_[row.first_place + i])) return false;
  }
  return true;
}

// The shard of a gradient that matches the param's shard. Gradients are new DTensors at every step, but their specs are
// usually the same objects. Python handles shards that are still being communicated or have other placements.
at::Tensor ChangeDetector::shard_of_grad(PolledRow& row, const at::Tensor& grad) const {
  const auto whole = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
  const py::object spec = attribute(whole.ptr(), name_of_spec());
  const py::object shard = attribute(whole.ptr(), name_of_shard());
  if (spec.ptr() == row.spec.ptr() && !wraps(unpack(shard))) return unpack(shard);
  const auto param = py::reinterpret_borrow<py::object>(row.param);
  const py::module_ shards = py::module_::import("fused_optim.engine.dtensor");
  const py::object found = shards.attr("local_grad")(param, whole);
  if (found.ptr() == shard.ptr()) row.spec = spec;
  return unpack(found);
}

bool ChangeDetector::poll_grad(size_t number, int& answer) {
  PolledRow& row = rows_[number];
  const at::Tensor &param = unpack(row.param), &target = unpack(row.target);
  const at::Tensor& whole = param.unsafeGetTensorImpl()->grad();
  if (!whole.defined()) {
    hold(number, at::Tensor(), answer);
    return true;
  }
  if (whole.scalar_type() != row.grad_dtype || whole.device() != param.device() || whole.sizes() != param.sizes())
    return false;
  if (whole.layout() != at::kStrided || wraps(whole) != row.spread) return false;
  at::Tensor grad = row.spread ? shard_of_grad(row, whole) : whole;
  if (!has_memory(grad)) return false;
  if (!plain(grad) || !same_layout(grad, target)) {
    c10::NoGradGuard no_grad;
    grad = at::empty_strided(target.sizes(), target.strides(), grad.options()).copy_(grad);
  }
  hold(number, std::move(grad), answer);
  return true;
}

// Keeps the gradient of a row, undefined if it has none, until the step is done. Writes its address.
void ChangeDetector::hold(size_t number, at::Tensor grad, int& answer) {
  PolledRow& row = rows_[number];
  int64_t address = 0;
  if (grad.defined()) {
    address = reinterpret_cast<int64_t>(grad.unsafeGetTensorImpl()->data());
    if (address == 0) address = kEmpty;
  }
  if (*row.grad_slot != address) {
    if (address != 0) {
      row.grad = grad.unsafeGetTensorImpl();
      row.grad_storage = row.grad->unsafe_storage().unsafeGetStorageImpl();
    }
    *row.grad_slot = address;
    answer |= kGradsMoved;
  }
  held_[number] = std::move(grad);
}

void ChangeDetector::prefetch_done(size_t number) const {
  if (number >= rows_.size()) return;
  const PolledRow& row = rows_[number];
  __builtin_prefetch(reinterpret_cast<const char*>(row.param) + 16);
  __builtin_prefetch(reinterpret_cast<const char*>(row.impl) + 40);
  __builtin_prefetch(static_cast<const char*>(row.version) + 16, 1);
  __builtin_prefetch(reinterpret_cast<const char*>(row.grad) + 8, 1);
}

void ChangeDetector::done() {
  for (size_t ahead = 0; ahead < kAhead; ++ahead) prefetch_done(ahead);
  for (size_t number = 0; number < held_.size(); ++number) {
    prefetch_done(number + kAhead);
    held_[number].reset();
    const PolledRow& row = rows_[number];
    if (*row.grad_slot != 0 && !row.inference) unpack(row.param).unsafeGetTensorImpl()->bump_version();
  }
  for (const Shard& entry : states_.shards()) {
    const at::Tensor& shard = unpack(entry.shard);
    if (!shard.is_inference()) shard.unsafeGetTensorImpl()->bump_version();
  }
  for (size_t i = 0; i < guarded_.size(); ++i) versions_[i] = unpack(guarded_[i])._version();
}

}  // namespace fused_optim
