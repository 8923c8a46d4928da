// What NEURON_EXT_LOG=1 prints of the choice of a CPU kernel.
#pragma once

#include "blocking.h"
#include "registry.h"

namespace neuron_ext::cpu {

/// `cut` is null for rows that aren't blocked. Does nothing, and takes no lock, unless the variable
/// is set.
void log_choice(const GemmKernel& kernel, const GemmDesc& desc, const Blocking* cut);

}  // namespace neuron_ext::cpu
