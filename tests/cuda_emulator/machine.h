// The emulated GPU's state: blocks that are resident, their threads, and who has seen what of whom.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "control.h"
#include "emulator.h"
#include "fiber.h"

namespace neuron_ext::emulator {

#ifdef NEURON_EXT_EMULATOR_SEES_ACCESSES
inline constexpr bool kSeesAccesses = true;
#else
inline constexpr bool kSeesAccesses = false;
#endif

/// Where in the kernel something happened: a return address.
using Site = const void*;
const std::string& describe(Site site);

/// Ends the launch with this error. Never returns to the kernel.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- who has seen what --------------------------------------------------------------------------

/// A vector clock: for each agent of a block (its threads, then its asynchronous units), the time
/// up to which its accesses are known to have happened.
using Clock = std::vector<std::uint32_t>;

/// What is known of other blocks, by number; empty in most kernels.
using ForeignClocks = std::map<std::int64_t, Clock>;

void join(Clock& clock, const Clock& other);
void join(ForeignClocks& clocks, const ForeignClocks& others);

/// The asynchronous units of a block. Copies and stores take turns, so that having waited for one
/// isn't having waited for those before it.
inline constexpr int kLoadUnits = 32, kStoreUnits = 8, kProductUnits = 8;
inline constexpr int kUnits = kLoadUnits + kStoreUnits + kProductUnits;

inline constexpr int kWarpgroup = 128;

// ---- what is under way --------------------------------------------------------------------------

struct CopyAsync {
  std::byte* shared;
  const std::byte* global;
  int bytes, valid_bytes;
  Site site;
};

struct TmaLoad {
  std::byte* shared;
  TensorMap map;
  void* barrier;
  int row, column;
  Clock clock;  // of the unit, after everything that the issuing thread had seen
  int unit;
  Site site;
};

struct TmaStore {
  TensorMap map;
  const std::byte* shared;
  int row, column;
  int unit;
  std::uint32_t time;
  Site site;
};

struct Product {  // a wgmma: what each thread of the warpgroup passed
  int n;
  DType dtype;
  std::uint64_t a, b;
  bool a_is_mn_major, b_is_mn_major, accumulate;
  std::array<float*, kWarpgroup> d;
  std::array<const std::uint32_t*, kWarpgroup> a_registers;  // null: A is in shared memory
  int group;
  std::uint32_t time;
};

struct Mbarrier {
  int arrivals;              // that complete a phase
  int pending;               // of them, in this phase
  std::int64_t bytes = 0;    // announced and not delivered, or, if negative, the other way round
  std::uint32_t parity = 0;  // of the phase under way
  int maker;
  std::uint32_t made_at;
  bool fenced = false;
  Clock arrived, completed;  // what those who arrived had seen: in this phase, in the last
  ForeignClocks foreign;
};

// ---- threads and blocks -------------------------------------------------------------------------

struct Block;

enum class State : std::uint8_t { kReady, kWaiting, kFinished };
enum class Wait : std::uint8_t { kBarrier, kCollective, kMbarrier, kOtherBlocks };

struct Thread {
  Fiber fiber;
  Block* block;
  int index, warp, lane;
  Index position;
  State state;
  Wait wait;
  Site site;

  Clock clock;
  ForeignClocks foreign;

  std::vector<CopyAsync> copies;              // not committed
  std::deque<std::vector<CopyAsync>> groups;  // committed, not waited for
  std::vector<TmaStore> stores;
  std::deque<std::vector<TmaStore>> store_groups;
  int product_groups = 0;
  bool products_fenced = false;
  std::uint32_t proxy_fence = 0;  // the time of the last
};

struct Barrier {
  struct Arrival {
    int thread;
    Site site;
  };

  int expected = 0;
  std::vector<Arrival> arrived;
  std::vector<int> waiting;  // threads, of those that arrived
  Clock clock;               // what those who arrived had seen
  ForeignClocks foreign;
  bool all = true;  // of block_all's votes
};

/// Lanes of a warp, or threads of a warpgroup, that execute one instruction together.
struct Collective {
  const char* name;
  int first, count;  // threads
  std::uint32_t lanes;
  int arrived = 0;
  Site site;
  std::array<void*, kWarpgroup> arguments{};
};

/// One shared memory cell of two bytes, the smallest element.
struct Cell {
  std::uint32_t write_time = 0, read_time = 0;
  std::uint16_t writer = 0, reader = 0;
  bool allocated = false, is_mbarrier = false;
  std::uint8_t copies = 0;  // under way, into it
  Site write_site = nullptr, read_site = nullptr;
  std::unique_ptr<Clock> readers;  // if there are several
};

struct Block {
  std::int64_t number = 0;
  Index position{};
  std::vector<std::unique_ptr<Thread>> threads;  // as many as any block had
  int thread_count = 0;
  int finished = 0;
  std::vector<int> order;  // in which threads run

  std::byte* shared = nullptr;
  std::size_t shared_used = 0, static_bytes = 0;
  std::map<const void*, std::size_t> statics;  // offsets
  std::vector<Cell> cells;

  std::array<Barrier, 16> barriers;
  std::deque<Collective> collectives;
  std::map<void*, Mbarrier> mbarriers;
  std::deque<TmaLoad> loads;
  std::array<std::deque<Product>, kProductUnits> products;   // of each warpgroup
  std::array<std::uint32_t, kProductUnits> products_done{};  // the time of the last
  std::array<std::uint32_t, kUnits> unit_times{};
  int next_load_unit = 0, next_store_unit = 0;

  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  int unit(int index) const { return thread_count + index; }  // as an agent
  int agents() const { return thread_count + kUnits; }
};

inline constexpr std::size_t kSharedLimit = 227 << 10, kStaticLimit = 48 << 10;
inline constexpr std::size_t kArenaBytes = 512 << 10;  // shared memory with its red zones

struct Machine {
  Settings settings;
  std::string error;
  bool failed = false;
  std::mt19937 random;

  Thread* current = nullptr;  // null: the scheduler runs
  std::deque<Block*> resident;
  std::vector<std::unique_ptr<Block>> blocks;  // resident and reusable
  std::size_t dynamic_bytes = 0;
  std::int64_t launch_number = 0;
  std::map<const void*, ForeignClocks> counters;  // what was released by adding to them
};

extern Machine machine;

// ---- machine.cpp --------------------------------------------------------------------------------

/// Suspends the thread until someone makes it ready.
void wait(Wait what, Site site);
void make_ready(Block& block, Wait what);

/// The last to come runs `execute` for all, with each one's argument; null for those not in
/// `lanes`.
void collective(const char* name, int count, std::uint32_t lanes, void* argument, Site site,
                void (*execute)(Block& block, int first, void** arguments));

/// What this thread does from now on happens after what others have been told of.
void tick(Thread& thread);

// ---- memory.cpp ---------------------------------------------------------------------------------

void reset_shared(Block& block);
bool is_shared(const Block& block, const void* address);

/// An access by an agent that has seen `clock`: bounds, initialisation, races. Of shared memory;
/// does nothing unless this is the race build.
void access_shared(Block& block, std::size_t offset, std::size_t bytes, bool write, int agent,
                   const Clock& clock, Site site);

/// The same of global memory, by a thread, or on its behalf.
void access_global(Thread& thread, const void* address, std::size_t bytes, bool write, Site site);

/// By the current thread, of either.
void access(const void* address, std::size_t bytes, bool write, Site site);

/// Asynchronous copies into shared memory that nobody may touch meanwhile.
void set_under_way(Block& block, std::size_t offset, std::size_t bytes, bool under_way);

/// The asynchronous proxy reads: everything there must have been written by it, or fenced.
void check_proxy(Block& block, std::size_t offset, std::size_t bytes, const char* reader);

// ---- async.cpp ----------------------------------------------------------------------------------

/// Lets one late copy of the block happen; false if there is none.
bool complete_one_load(Block& block);
void check_nothing_under_way(Block& block);

// ---- tensor_core.cpp ----------------------------------------------------------------------------

/// Calls f with the offset of each 16-byte piece of shared memory that a wgmma reads.
void for_each_piece(const Product& product, const std::function<void(std::size_t offset)>& f);
void multiply(Block& block, const Product& product);

}  // namespace neuron_ext::emulator
