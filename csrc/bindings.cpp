// What Python sees of the C++.
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/floor.h"
#include "cpu/simd.h"
#include "cuda/step.h"
#include "watch.h"

namespace fused_optim {
namespace {

// Waking a second thread takes longer than a small step. A chunk costs some 64 elements before its first one.
int threads_for(int64_t elements, int64_t chunks) { return elements + 64 * chunks < 32768 ? 1 : at::get_num_threads(); }

template <class T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

const float* optional_data(const std::optional<at::Tensor>& tensor) {
  return tensor ? data<const float>(*tensor) : nullptr;
}

Tables tables(const at::Tensor& desc, const at::Tensor& rows, const at::Tensor& grads, const at::Tensor& lr,
              const at::Tensor& raw, const at::Tensor& group, const at::Tensor& hyper,
              const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
  return {data<const int64_t>(desc),
          data<const int64_t>(rows),
          data<const int64_t>(grads),
          data<const int64_t>(lr),
          data<const double>(raw),
          data<const int32_t>(group),
          data<double>(hyper),
          optional_data(grad_scale),
          optional_data(found_inf),
          desc.numel(),
          rows.size(0)};
}

void require_rule(bool found, const std::string& rule) {
  if (!found)
    throw py::value_error("the extension has no rule \"" + rule +
                          "\"; rebuild it (pip install .) so that it matches the Python files");
}

// The floor pass over given tensors, ready to run. written: the streams one after the other, each as a list of as many
// tensors as `read`; tensor t of all has one size.
class FloorPass {
 public:
  FloorPass(const std::vector<at::Tensor>& written, const std::vector<at::Tensor>& read) : tensors_(written) {
    TORCH_CHECK(!read.empty() && written.size() % read.size() == 0,
                "a floor pass wants whole streams of as many tensors as are read");
    const size_t tensors = read.size();
    streams_ = static_cast<int>(written.size() / tensors);
    TORCH_CHECK(streams_ >= 1 && streams_ <= 8, "a floor pass takes one to eight written streams, but got ", streams_);
    tensors_.insert(tensors_.end(), read.begin(), read.end());
    for (size_t t = 0; t < tensors; ++t) {
      FloorRow row{{}, static_cast<int64_t>(read[t].nbytes())};
      for (int s = 0; s < streams_; ++s) row.streams.push_back(data<char>(written[s * tensors + t]));
      row.streams.push_back(data<char>(read[t]));
      rows_.push_back(std::move(row));
    }
    spans_ = floor_spans(rows_);
  }

  void run() const {
    py::gil_scoped_release release;
    floor_pass(spans_, streams_, at::get_num_threads());
  }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<FloorRow> rows_;
  std::vector<FloorSpan> spans_;
  int streams_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("LAYOUT") = py::make_tuple(kChunk, kRowWidth, kRawWidth, kHyperWidth);
  m.def("instruction_set", [] { return instruction_set().name; });

  m.def("step_cpu",
        [](const std::string& rule, const at::Tensor& desc, const at::Tensor& rows, const at::Tensor& grads,
           const at::Tensor& lr, const at::Tensor& raw, const at::Tensor& group, const at::Tensor& hyper,
           const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf, int64_t elements) {
          const Tables t = tables(desc, rows, grads, lr, raw, group, hyper, grad_scale, found_inf);
          bool found;
          {
            py::gil_scoped_release release;
            found = instruction_set().step(rule.c_str(), t, threads_for(elements, t.chunks));
          }
          require_rule(found, rule);
        });

  m.def("step_cuda_emulated",
        [](const std::string& rule, const at::Tensor& desc, const at::Tensor& rows, const at::Tensor& grads,
           const at::Tensor& lr, const at::Tensor& raw, const at::Tensor& group, const at::Tensor& hyper,
           const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
          require_rule(launch_step_emulated(
                           rule.c_str(), tables(desc, rows, grads, lr, raw, group, hyper, grad_scale, found_inf)) == 0,
                       rule);
        });

#ifdef WITH_CUDA
  m.attr("WITH_CUDA") = true;
  m.def("step_cuda", [](const std::string& rule, const at::Tensor& desc, const at::Tensor& rows,
                        const at::Tensor& grads, const at::Tensor& lr, const at::Tensor& raw, const at::Tensor& group,
                        const at::Tensor& hyper, const std::optional<at::Tensor>& grad_scale,
                        const std::optional<at::Tensor>& found_inf, int64_t stream, int device) {
    const Tables t = tables(desc, rows, grads, lr, raw, group, hyper, grad_scale, found_inf);
    const int error = launch_step_cuda(rule.c_str(), t, reinterpret_cast<void*>(stream), device);
    require_rule(error != kUnknownRule, rule);
    if (error != 0)
      throw std::runtime_error(std::string("the CUDA step could not be launched: ") + cuda_error_text(error));
  });
#else
  m.attr("WITH_CUDA") = false;
#endif

  py::class_<FloorPass>(m, "FloorPass")
      .def(py::init<const std::vector<at::Tensor>&, const std::vector<at::Tensor>&>(), py::arg("written"),
           py::arg("read"))
      .def("__call__", &FloorPass::run);

  py::class_<Watch>(m, "Watch")
      .def(
          py::init<py::list, py::dict, const std::vector<std::tuple<std::string, int, int>>&, at::Tensor, at::Tensor>())
      .def("add_pending", &Watch::add_pending)
      .def("add_row", &Watch::add_row)
      .def("look", &Watch::look)
      .def("done", &Watch::done);
}

}  // namespace fused_optim
