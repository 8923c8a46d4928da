#include "log.h"

#include <sstream>

#include "forms.h"
#include "neuron_ext/log.h"

namespace neuron_ext::cpu {

void log_choice(const GemmKernel& kernel, const GemmDesc& desc, const Blocking* cut) {
  if (!log_is_on()) return;
  std::ostringstream plan;
  plan << "; " << name_of(form_of(desc));
  if (cut != nullptr) {
    plan << ", tiles " << cut->tiles_m << " x " << cut->tiles_n << " of " << cut->tile_m << " x "
         << cut->tile_n << ", k in " << cut->chunks << " chunks, blocks of " << cut->kc;
  }
  neuron_ext::log_choice(kernel.name, desc, plan.str());
}

}  // namespace neuron_ext::cpu
