// The activations a layer can end in. A new one is a line here, a forward and a gradient functor on
// each device, and a name in functional.py and nn.py; no glue changes.
#pragma once

#include <cstdint>

namespace neuron_ext {

enum class Activation : std::uint8_t { kIdentity, kSigmoid };

/// What the gradient of an activation is a function of, and so what a layer must save.
enum class GradientNeeds : std::uint8_t { kNothing, kOutput, kInput };

constexpr GradientNeeds gradient_needs(Activation activation) {
  switch (activation) {
    case Activation::kIdentity:
      return GradientNeeds::kNothing;
    case Activation::kSigmoid:
      return GradientNeeds::kOutput;  // y (1 - y)
  }
  return GradientNeeds::kNothing;
}

constexpr const char* name_of(Activation activation) {
  switch (activation) {
    case Activation::kIdentity:
      return "identity";
    case Activation::kSigmoid:
      return "sigmoid";
  }
  return "?";
}

}  // namespace neuron_ext
