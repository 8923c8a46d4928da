#include "registry.h"

namespace neuron_ext::cpu {

void activate(Activation f, DType dtype, std::int64_t n, const void* x, std::int64_t x_stride,
              void* y, std::int64_t y_stride) {
  choose_elementwise().activate[static_cast<int>(dtype)](f, n, x, x_stride, y, y_stride);
}

void activate_backward(Activation f, DType dtype, std::int64_t n, const void* dy,
                       std::int64_t dy_stride, const void* saved, std::int64_t saved_stride,
                       void* dx, std::int64_t dx_stride) {
  choose_elementwise().activate_backward[static_cast<int>(dtype)](f, n, dy, dy_stride, saved,
                                                                  saved_stride, dx, dx_stride);
}

}  // namespace neuron_ext::cpu
