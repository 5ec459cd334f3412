// The Python module fdda_ext._C. Importing it loads this library, whose static initializers
// register the operators with torch. The module itself knows nothing of tensors: it answers
// questions about the build and sets switches that a dispatcher schema cannot express.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/stable.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of fdda_ext: registers torch.ops.fdda, build facts and switches.";
}
