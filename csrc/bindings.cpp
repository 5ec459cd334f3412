// The Python module fdda_ext._C. Importing it loads this library, whose static initializers
// register the operators with torch. Its own functions report facts about the build and set
// switches that a dispatcher schema cannot express.

#include "common/stable.h"
#include "cpu/isa/dispatch.h"

#if defined(FDDA_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

// With a target version, torch 2.11 refuses its copy of pybind11, because its types must not enter
// operators. None does here.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace {

// Versions of the CUDA runtime in this library and of the CUDA that the driver supports. (0, 0)
// without CUDA kernels; the second is 0 without a driver.
py::tuple cuda_versions() {
  int runtime = 0;
  int driver = 0;
#if defined(FDDA_WITH_CUDA)
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
#endif
  return py::make_tuple(runtime, driver);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of fdda_ext: operators of torch.ops.fdda, build facts and switches.";
  m.attr("built_with_torch") = FDDA_BUILT_WITH_TORCH;
  m.attr("stable_abi") = FDDA_STABLE_ABI;
  m.attr("cuda_archs") = FDDA_CUDA_ARCHS;
  m.def("cuda_versions", &cuda_versions);
  m.def("compiled_isas", &fdda::cpu::compiled_isas);
  m.def("supported_isas", &fdda::cpu::supported_isas);
  m.def("isa", &fdda::cpu::isa);
  m.def("set_isa", &fdda::cpu::set_isa, py::arg("name"));
  m.def("num_threads", &torch::stable::get_num_threads);
}
