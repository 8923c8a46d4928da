// Which instruction sets may be used: detected once, overridden by NEURON_EXT_CPU_ISA or
// set_active_isa.
#pragma once

#include "neuron_ext/cpu.h"

namespace neuron_ext::cpu {

/// True when both the CPU and the operating system (which must save the registers) have the ISA.
bool is_supported(Isa isa);

}  // namespace neuron_ext::cpu
