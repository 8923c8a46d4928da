// Weights that don't change, packed once and kept: neuron_ext.backends.set_packed_weights says
// when, and what can go wrong.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace neuron_ext {

/// The weight (out, in) as MlpLayer::packed_weight and, for Wᵀ, as GemmPointers::packed_b, for a
/// batch of `rows`; undefined if none is kept, or it isn't worth it. Whoever holds the result may
/// use it, whatever is dropped meanwhile.
at::Tensor packed_weight(const at::Tensor& weight, std::int64_t rows);

}  // namespace neuron_ext
