// The one place where the operations are registered with torch.

#include "glue.h"

namespace neuron_ext {

void register_library() {
  // TORCH_LIBRARY would do this while the library is being loaded, where an error ends the process;
  // a second copy (an installed one beside one compiled on the fly) must be an error that can be
  // caught.
  TORCH_CHECK(
      !c10::Dispatcher::singleton().findSchema({"neuron_ext::linear", ""}).has_value(),
      "neuron_ext's operations are registered already: another copy of its compiled library is "
      "loaded in this process, and only one can be");
  static torch::Library library(torch::Library::DEF, "neuron_ext", std::nullopt, __FILE__,
                                __LINE__);
  register_linear(library);
  register_sigmoid(library);
  register_mlp(library);
}

// In a Python extension (torch defines TORCH_EXTENSION_NAME for all its sources) the module's
// initialiser registers, where an error is an ImportError; in a plain C++ library, loading it does.
#ifndef TORCH_EXTENSION_NAME
namespace {
[[maybe_unused]] const bool registered = (register_library(), true);
}
#endif

}  // namespace neuron_ext
