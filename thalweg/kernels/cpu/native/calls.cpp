// All kernels by name, and calls of them that were noted once and are made again (cpu/calls.py).
#include "kernels.h"

#include <cstring>
#include <type_traits>
#include <utility>

namespace {

// As ctypes will be told: an address, a whole number, a float.
template <class T>
constexpr char LETTER = std::is_pointer<T>::value ? 'p' : std::is_floating_point<T>::value ? 'f' : 'n';

// An argument from the eight bytes in which it is noted.
template <class T>
inline T as(int64_t noted) {
    if constexpr (std::is_pointer<T>::value) {
        return reinterpret_cast<T>(noted);
    } else if constexpr (std::is_floating_point<T>::value) {
        T value;
        memcpy(&value, &noted, sizeof(value));
        return value;
    } else {
        return (T)noted;
    }
}

template <auto function>
struct Noted;

template <class... Types, void (*function)(Types...)>
struct Noted<function> {
    static constexpr char types[] = {LETTER<Types>..., '\0'};

    static void call(const int64_t* arguments) { call(arguments, std::index_sequence_for<Types...>()); }

    template <size_t... at>
    static void call(const int64_t* arguments, std::index_sequence<at...>) {
        function(as<Types>(arguments[at])...);
    }
};

struct Kernel {
    const char *name, *types;
    void (*call)(const int64_t*);
};

#define KERNEL(name) {#name, Noted<thalweg_##name>::types, Noted<thalweg_##name>::call}
const Kernel KERNELS[] = {
    KERNEL(add),         KERNEL(arithmetic),  KERNEL(attention),    KERNEL(compress),   KERNEL(copy_rows),
    KERNEL(experts),     KERNEL(fill_rows),   KERNEL(gather_rows),  KERNEL(index_topk), KERNEL(linear),
    KERNEL(mix_head),    KERNEL(mix_in),      KERNEL(mix_out),      KERNEL(multiply),   KERNEL(narrow),
    KERNEL(read_rows),   KERNEL(reading),     KERNEL(rms_norm),     KERNEL(rotate),     KERNEL(round_rows),
    KERNEL(route),       KERNEL(store_rows),   KERNEL(swiglu),     KERNEL(widen),
};
constexpr long COUNT = sizeof(KERNELS) / sizeof(KERNELS[0]);

// arguments[at] is an address: `offset` bytes into the given input.
struct Patch {
    int64_t at, input, offset;
};

}  // namespace

extern "C" {

const char* thalweg_kernel_name(long number) { return number < COUNT ? KERNELS[number].name : nullptr; }
const char* thalweg_kernel_types(long number) { return KERNELS[number].types; }

// Calls kernels[0] to kernels[count - 1], whose arguments lie one after another. Inputs are where they say now; `now`
// is the call under way, for whoever asks where it hangs.
void thalweg_repeat(const int64_t* kernels, long count, int64_t* arguments, const int64_t* patches, long patched,
                    const int64_t* inputs, const int64_t* lengths, volatile int64_t* now) {
    const Patch* const places = (const Patch*)patches;
    for (long i = 0; i < patched; i++) arguments[places[i].at] = inputs[places[i].input] + places[i].offset;
    for (long i = 0; i < count; i++) {
        *now = i;
        KERNELS[kernels[i]].call(arguments);
        arguments += lengths[kernels[i]];
    }
    *now = -1;
}
}
