// Launches, and the scheduler: START HERE. A block's threads are fibers, which run one at a time
// until they have to wait. Blocks run one after the other; only where one waits for another do more
// become resident.
#include "machine.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

neuron_ext::emulator::Index threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace neuron_ext::emulator {

Machine machine;

Settings& settings() { return machine.settings; }
const std::string& last_error() { return machine.error; }
bool is_emulated() { return true; }

bool sees_accesses() { return kSeesAccesses; }

// ---- errors -------------------------------------------------------------------------------------

namespace {

struct Failure {};  // thrown where the scheduler itself finds an error

std::string formatted(const char* format, std::va_list arguments) {
  std::va_list copy;
  va_copy(copy, arguments);
  std::string text(static_cast<std::size_t>(std::vsnprintf(nullptr, 0, format, copy)), '\0');
  va_end(copy);
  std::vsnprintf(text.data(), text.size() + 1, format, arguments);
  return text;
}

}  // namespace

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  machine.error = formatted(format, arguments);
  va_end(arguments);
  machine.failed = true;
  Thread* const thread = machine.current;
  if (thread == nullptr) throw Failure{};
  const Index b = thread->block->position, t = thread->position;
  char where[96];
  std::snprintf(where, sizeof(where), " [block (%u, %u, %u), thread (%u, %u, %u)]", b.x, b.y, b.z,
                t.x, t.y, t.z);
  machine.error += where;
  thread->fiber.suspend();  // the scheduler sees `failed`, and doesn't come back
  std::abort();
}

namespace {

/// The innermost line at this address that isn't one of csrc/cuda/ptx.
std::string line_at(Site site) {
  Dl_info module;
  if (site == nullptr || dladdr(site, &module) == 0) return "?";
  const auto address = reinterpret_cast<std::uintptr_t>(site) - 1;  // in the call, not after it
  const auto base = reinterpret_cast<std::uintptr_t>(module.dli_fbase);
  char text[512];
  std::snprintf(text, sizeof(text), "addr2line -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname,
                static_cast<std::size_t>(address - base));
  std::string found;
  if (std::FILE* const lines = popen(text, "r")) {
    while (std::fgets(text, sizeof(text), lines) != nullptr) {
      const std::string line(text, std::strcspn(text, " \n"));
      const bool is_wrapper =
          line.find("/ptx/") != std::string::npos || line.find("/emulator.h") != std::string::npos;
      if (found.empty() && !is_wrapper && line[0] != '?') {
        found = line.substr(line.rfind('/') + 1);
      }
    }
    pclose(lines);
  }
  if (!found.empty()) return found;
  std::snprintf(text, sizeof(text), "%p", site);
  return text;
}

}  // namespace

const std::string& describe(Site site) {
  static std::map<Site, std::string> known;  // asking takes a process
  const auto [found, is_first] = known.try_emplace(site);
  if (is_first) found->second = line_at(site);
  return found->second;
}

// ---- clocks -------------------------------------------------------------------------------------

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (std::size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

void join(ForeignClocks& clocks, const ForeignClocks& others) {
  for (const auto& [block, clock] : others) join(clocks[block], clock);
}

void tick(Thread& thread) {
  if (kSeesAccesses) ++thread.clock[static_cast<std::size_t>(thread.index)];
}

// ---- barriers -----------------------------------------------------------------------------------

void wait(Wait what, Site site) {
  Thread& thread = *machine.current;
  thread.state = State::kWaiting;
  thread.wait = what;
  thread.site = site;
  thread.fiber.suspend();
}

void make_ready(Block& block, Wait what) {
  for (int i = 0; i < block.thread_count; ++i) {
    Thread& thread = *block.threads[i];
    if (thread.state == State::kWaiting && thread.wait == what) thread.state = State::kReady;
  }
}

namespace {

/// Counts the current thread; true for the last, with whom all that wait go on.
bool arrive(Barrier& barrier, int id, int threads, bool waits, Site site) {
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  if (id < 0 || id > 15) fail("barrier %d: there are 0 to 15", id);
  const int expected = threads == 0 ? block.thread_count : threads;
  if (expected % 32 != 0 && threads != 0)
    fail("barrier %d: %d threads aren't whole warps", id, threads);
  if (!barrier.arrived.empty() && barrier.expected != expected) {
    fail("barrier %d: for %d threads at %s, for %d before", id, expected, describe(site).c_str(),
         barrier.expected);
  }
  for (const Barrier::Arrival& other : barrier.arrived) {
    if (other.thread == thread.index) {
      fail("barrier %d: thread %d arrives twice, at %s", id, other.thread, describe(site).c_str());
    }
    if (block.threads[other.thread]->warp == thread.warp && other.site != site &&
        describe(other.site) != describe(site)) {
      fail("divergent barrier %d: at %s and %s in one warp", id, describe(site).c_str(),
           describe(other.site).c_str());
    }
  }
  barrier.expected = expected;
  barrier.arrived.push_back({thread.index, site});
  if (waits) barrier.waiting.push_back(thread.index);
  if (kSeesAccesses) {
    join(barrier.clock, thread.clock);
    join(barrier.foreign, thread.foreign);
    tick(thread);
  }
  if (static_cast<int>(barrier.arrived.size()) < expected) return false;
  for (int i : barrier.waiting) {
    Thread& other = *block.threads[i];
    if (kSeesAccesses) {
      join(other.clock, barrier.clock);
      join(other.foreign, barrier.foreign);
    }
    other.state = State::kReady;
  }
  barrier.arrived.clear();
  barrier.waiting.clear();
  barrier.clock.clear();
  barrier.foreign.clear();
  return true;
}

/// All of the block meet at `barrier`.
void sync(Barrier& barrier, int id, int threads, Site site) {
  if (!arrive(barrier, id, threads, true, site)) wait(Wait::kBarrier, site);
}

}  // namespace

void barrier_sync(int id, int threads) {
  sync(machine.current->block->barriers[id & 15], id, threads, __builtin_return_address(0));
}

void barrier_arrive(int id, int threads) {
  arrive(machine.current->block->barriers[id & 15], id, threads, false,
         __builtin_return_address(0));
}

bool block_all(bool vote) {
  const Site site = __builtin_return_address(0);
  Barrier& barrier = machine.current->block->barriers[0];
  if (barrier.arrived.empty()) barrier.all = true;
  barrier.all = barrier.all && vote;
  sync(barrier, 0, 0, site);
  const bool all = barrier.all;
  sync(barrier, 0, 0, site);  // nobody votes anew before all have read
  return all;
}

void collective(const char* name, int count, std::uint32_t lanes, void* argument, Site site,
                void (*execute)(Block& block, int first, void** arguments)) {
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  const int first = thread.index / count * count, place = thread.index - first;
  if (count == 32 && !(lanes >> place & 1)) {
    fail("%s: lane %d isn't in its own mask %08x", name, place, lanes);
  }
  if (first + count > block.thread_count && count > 32) {
    fail("%s: the block's last warpgroup isn't whole", name);
  }
  auto found = std::find_if(block.collectives.begin(), block.collectives.end(), [&](Collective& c) {
    return c.first == first && c.count == count && c.lanes == lanes && c.name == name &&
           c.arguments[static_cast<std::size_t>(place)] == nullptr;
  });
  if (found == block.collectives.end()) {
    block.collectives.push_back(
        {.name = name, .first = first, .count = count, .lanes = lanes, .site = site});
    found = block.collectives.end() - 1;
  }
  found->arguments[static_cast<std::size_t>(place)] = argument;
  if (++found->arrived < (count == 32 ? __builtin_popcount(lanes) : count)) {
    wait(Wait::kCollective, site);
    return;
  }
  Collective complete = *found;
  block.collectives.erase(found);
  execute(block, first, complete.arguments.data());
  for (int i = 0; i < count; ++i) {
    if (complete.arguments[static_cast<std::size_t>(i)] != nullptr) {
      block.threads[first + i]->state = State::kReady;
    }
  }
}

void warp_sync(std::uint32_t lanes) {
  int nothing;
  collective("warp_sync", 32, lanes, &nothing, __builtin_return_address(0),
             [](Block& block, int first, void** arguments) {
               if (!kSeesAccesses) return;
               Clock clock;
               ForeignClocks foreign;
               for (int i = 0; i < 32; ++i) {
                 if (arguments[i] == nullptr) continue;
                 join(clock, block.threads[first + i]->clock);
                 join(foreign, block.threads[first + i]->foreign);
               }
               for (int i = 0; i < 32; ++i) {
                 if (arguments[i] == nullptr) continue;
                 Thread& lane = *block.threads[first + i];
                 lane.clock = clock;
                 lane.foreign = foreign;
                 tick(lane);
               }
             });
}

int lane() { return machine.current->lane; }

std::uint32_t ballot(bool vote) {
  struct Argument {
    bool vote;
    std::uint32_t votes;
  } argument{vote, 0};
  collective("ballot", 32, ~0u, &argument, __builtin_return_address(0),
             [](Block&, int, void** arguments) {
               std::uint32_t votes = 0;
               for (int i = 0; i < 32; ++i) {
                 votes |= std::uint32_t{static_cast<Argument*>(arguments[i])->vote} << i;
               }
               for (int i = 0; i < 32; ++i) static_cast<Argument*>(arguments[i])->votes = votes;
             });
  return argument.votes;
}

std::uint64_t shuffle_bits(std::uint64_t bits, int source) {
  struct Argument {
    std::uint64_t own, received;
    int source;
  } argument{bits, 0, source & 31};
  collective("shuffle", 32, ~0u, &argument, __builtin_return_address(0),
             [](Block&, int, void** arguments) {
               for (int i = 0; i < 32; ++i) {
                 auto& lane = *static_cast<Argument*>(arguments[i]);
                 lane.received = static_cast<Argument*>(arguments[lane.source])->own;
               }
             });
  return argument.received;
}

// ---- counters that blocks share ----------------------------------------------------------------

namespace {

void acquire(Thread& thread, const void* counter) {
  if (!kSeesAccesses) return;
  for (const auto& [block, clock] : machine.counters[counter]) {
    if (block == thread.block->number) {
      join(thread.clock, clock);
    } else {
      join(thread.foreign[block], clock);
    }
  }
}

}  // namespace

std::uint32_t fetch_add(std::uint32_t* counter, std::uint32_t value) {
  Thread& thread = *machine.current;
  acquire(thread, counter);
  if (kSeesAccesses) {
    ForeignClocks& released = machine.counters[counter];
    join(released, thread.foreign);
    join(released[thread.block->number], thread.clock);
    tick(thread);
  }
  const std::uint32_t before = *counter;
  *counter += value;
  for (Block* block : machine.resident) make_ready(*block, Wait::kOtherBlocks);
  return before;
}

void wait_for_at_least(const std::uint32_t* counter, std::uint32_t value) {
  const Site site = __builtin_return_address(0);
  while (*counter < value) wait(Wait::kOtherBlocks, site);
  acquire(*machine.current, counter);
}

// ---- launch ------------------------------------------------------------------------------------

namespace {

const std::function<void()>* kernel_to_run;

void run_kernel() {
  Thread& thread = *machine.current;
  thread.fiber.entered();
  (*kernel_to_run)();
  thread.state = State::kFinished;
  ++thread.block->finished;
  thread.fiber.finish();
}

Block& admit(std::int64_t number, dim3 grid, dim3 shape) {
  auto free = std::find_if(machine.blocks.begin(), machine.blocks.end(), [](const auto& block) {
    return std::find(machine.resident.begin(), machine.resident.end(), block.get()) ==
           machine.resident.end();
  });
  if (free == machine.blocks.end()) {
    machine.blocks.push_back(std::make_unique<Block>());
    free = machine.blocks.end() - 1;
  }
  Block& block = **free;
  machine.resident.push_back(&block);
  block.number = number;
  block.position = {static_cast<unsigned>(number % grid.x),
                    static_cast<unsigned>(number / grid.x % grid.y),
                    static_cast<unsigned>(number / grid.x / grid.y)};
  block.thread_count = static_cast<int>(shape.x * shape.y * shape.z);
  block.finished = 0;
  block.barriers.fill({});
  block.collectives.clear();
  block.mbarriers.clear();
  block.loads.clear();
  for (auto& products : block.products) products.clear();
  block.products_done.fill(0);
  block.unit_times.fill(0);
  block.order.resize(static_cast<std::size_t>(block.thread_count));
  std::iota(block.order.begin(), block.order.end(), 0);
  if (machine.settings.order == Order::kReverse) {
    std::reverse(block.order.begin(), block.order.end());
  }
  block.next_load_unit = block.next_store_unit = 0;
  reset_shared(block);
  while (static_cast<int>(block.threads.size()) < block.thread_count) {
    block.threads.push_back(std::make_unique<Thread>());
  }
  for (int i = 0; i < block.thread_count; ++i) {
    Thread& thread = *block.threads[i];
    const auto index = static_cast<unsigned>(i);
    thread.block = &block;
    thread.index = i;
    thread.warp = i / 32;
    thread.lane = i % 32;
    thread.position = {index % shape.x, index / shape.x % shape.y, index / shape.x / shape.y};
    thread.state = State::kReady;
    thread.site = nullptr;
    thread.copies.clear();
    thread.groups.clear();
    thread.stores.clear();
    thread.store_groups.clear();
    thread.product_groups = 0;
    thread.products_fenced = false;
    thread.proxy_fence = 0;
    thread.foreign.clear();
    if (kSeesAccesses) {
      thread.clock.assign(static_cast<std::size_t>(block.agents()), 0);
      thread.clock[static_cast<std::size_t>(i)] = 1;
    }
    thread.fiber.start(run_kernel);
  }
  return block;
}

/// Runs each thread that can; false if none could.
bool run_ready_threads(Block& block) {
  if (machine.settings.order == Order::kShuffled) {
    std::shuffle(block.order.begin(), block.order.end(), machine.random);
  }
  bool ran = false;
  for (int i : block.order) {
    Thread& thread = *block.threads[i];
    if (thread.state != State::kReady) continue;
    ran = true;
    machine.current = &thread;
    threadIdx = thread.position;
    blockIdx = block.position;
    thread.fiber.resume();
    machine.current = nullptr;
    if (machine.failed) throw Failure{};
  }
  return ran;
}

bool waits_for_other_blocks(const Block& block) {
  for (int i = 0; i < block.thread_count; ++i) {
    const Thread& thread = *block.threads[i];
    if (thread.state == State::kWaiting && thread.wait == Wait::kOtherBlocks) return true;
  }
  return false;
}

[[noreturn]] void fail_deadlock() {
  constexpr const char* kWaits[] = {"at a barrier", "for its warp or warpgroup", "for an mbarrier",
                                    "for a counter"};
  const Block& block = *machine.resident.front();
  int waiting = 0;
  const Thread* first = nullptr;
  for (int i = 0; i < block.thread_count; ++i) {
    if (block.threads[i]->state != State::kWaiting) continue;
    ++waiting;
    if (first == nullptr) first = block.threads[i].get();
  }
  fail("deadlock: %d of %d threads of block %lld wait, thread %d %s, at %s", waiting,
       block.thread_count, static_cast<long long>(block.number), first->index,
       kWaits[static_cast<int>(first->wait)], describe(first->site).c_str());
}

void run_grid(dim3 grid, dim3 shape) {
  // More blocks than this that wait for each other are taken to need more than a GPU has.
  constexpr std::size_t kResidentLimit = 64;
  const std::int64_t count = std::int64_t{grid.x} * grid.y * grid.z;
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (machine.settings.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (machine.settings.order == Order::kShuffled) {
    std::shuffle(order.begin(), order.end(), machine.random);
  }
  auto next = order.begin();
  while (next != order.end() || !machine.resident.empty()) {
    if (machine.resident.empty()) admit(*next++, grid, shape);
    bool progress = false;
    for (std::size_t i = 0; i < machine.resident.size();) {
      Block& block = *machine.resident[i];
      progress |= run_ready_threads(block);
      if (block.finished == block.thread_count) {
        check_nothing_under_way(block);
        machine.resident.erase(machine.resident.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
    }
    if (progress) continue;
    const bool completed = std::any_of(machine.resident.begin(), machine.resident.end(),
                                       [](Block* block) { return complete_one_load(*block); });
    if (completed) continue;
    if (next == order.end() || machine.resident.size() == kResidentLimit ||
        !std::any_of(machine.resident.begin(), machine.resident.end(),
                     [](Block* block) { return waits_for_other_blocks(*block); })) {
      fail_deadlock();
    }
    admit(*next++, grid, shape);
  }
}

}  // namespace

int launch(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
           const std::function<void()>& kernel) {
  constexpr int kInvalidValue = 1, kInvalidConfiguration = 9;
  machine.error.clear();
  machine.failed = false;
  const std::int64_t threads = std::int64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.x > 0x7fffffffu ||
      grid.y == 0 || grid.y > 0xffffu || grid.z == 0 || grid.z > 0xffffu) {
    machine.error = "no such grid";
    return kInvalidConfiguration;
  }
  if (dynamic_shared_bytes > kSharedLimit) {
    machine.error = "more shared memory than there is";
    return kInvalidValue;
  }
  gridDim = grid;
  blockDim = block;
  kernel_to_run = &kernel;
  machine.random.seed(machine.settings.seed);
  machine.resident.clear();
  machine.counters.clear();
  machine.dynamic_bytes = dynamic_shared_bytes;
  ++machine.launch_number;
  try {
    run_grid(grid, block);
  } catch (const Failure&) {
    machine.current = nullptr;
    return kLaunchFailure;
  }
  return 0;
}

}  // namespace neuron_ext::emulator
