// One step of a sampler for the images of one table; see cpu_step.py.

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

constexpr int64_t BLOCK = 2048;  // elements of an image, the share of work that is given out
constexpr int MOST = 12;         // terms: of the histories of states, predictions and noises

struct bfloat16 {
    uint16_t bits;
};

inline float widen(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// All terms in one loop: with a pass for each, loads would wait for stores to other arrays at the same place of a page.
template <typename State, int TERMS, int COPIES>
void sum(int64_t count, const State* const* terms, const State* weights, State* next, State* input, State* second,
         State input_scale) {
    const State* values[TERMS + 1];
    State weight[TERMS + 1];
    for (int term = 0; term < TERMS; ++term) values[term] = terms[term], weight[term] = weights[term];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        State total = TERMS > 0 ? weight[0] * values[0][i] : State(0);
        for (int term = 1; term < TERMS; ++term) total += weight[term] * values[term][i];
        next[i] = total;
        if (COPIES > 0) input[i] = total * input_scale;
        if (COPIES > 1) second[i] = total * input_scale;
    }
}

template <typename State>
using Sum = void (*)(int64_t, const State* const*, const State*, State*, State*, State*, State);

template <typename State, int COPIES, int... TERMS>
Sum<State> pick(int64_t terms, std::integer_sequence<int, TERMS...>) {
    static constexpr Sum<State> sums[] = {sum<State, TERMS, COPIES>...};
    return sums[terms];
}

template <typename State, typename Given>
void run(const Given* prediction, const int64_t* slots, const int64_t* plan, const double* weights, int64_t images,
         int64_t size, int64_t negative, int64_t positive, State* input, int64_t second, int64_t threads) {
    using Counts = std::make_integer_sequence<int, MOST + 1>;
    const int64_t blocks = (size + BLOCK - 1) / BLOCK, terms = plan[0], next_slot = plan[1], newest = plan[2];
    const State scale = State(weights[0]), input_scale = State(weights[1]);
    const bool as_it_is = negative < 0 && sizeof(State) == sizeof(Given);
    const Sum<State> add = input == nullptr ? pick<State, 0>(terms, Counts{})
                           : second < 0     ? pick<State, 1>(terms, Counts{})
                                            : pick<State, 2>(terms, Counts{});
    State factors[MOST] = {};
    for (int64_t term = 0; term < terms; ++term) factors[term] = State(weights[2 + term]);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t part = 0; part < images * blocks; ++part) {
        const int64_t image = part / blocks, begin = part % blocks * BLOCK;
        const int64_t count = size - begin < BLOCK ? size - begin : BLOCK;
        const auto row = [&](int64_t slot) { return reinterpret_cast<State*>(slots[slot * images + image]) + begin; };

        const Given* up = prediction + (positive + image) * size + begin;
        if (!as_it_is) {
            const Given* down = prediction + (negative + image) * size + begin;
            State* kept = row(newest);
            if (negative >= 0) {
#pragma omp simd
                for (int64_t i = 0; i < count; ++i)
                    kept[i] = (State(widen(up[i])) - State(widen(down[i]))) * scale + State(widen(down[i]));
            } else {
#pragma omp simd
                for (int64_t i = 0; i < count; ++i) kept[i] = State(widen(up[i]));
            }
        }

        const State* values[MOST];
        for (int64_t term = 0; term < terms; ++term) values[term] = row(plan[3 + term]);
        State* first = input == nullptr ? nullptr : input + image * size + begin;
        add(count, values, factors, row(next_slot), first, first == nullptr ? nullptr : first + second * size,
            input_scale);
    }
}

}  // namespace

extern "C" void step(const void* prediction, int64_t kind, const int64_t* slots, const int64_t* plan,
                     const double* weights, int64_t images, int64_t size, int64_t negative, int64_t positive,
                     void* input, int64_t second, int64_t threads) {
    if (kind == 0)
        run<float>(static_cast<const float*>(prediction), slots, plan, weights, images, size, negative, positive,
                   static_cast<float*>(input), second, threads);
    else if (kind == 1)
        run<float>(static_cast<const bfloat16*>(prediction), slots, plan, weights, images, size, negative, positive,
                   static_cast<float*>(input), second, threads);
    else
        run<double>(static_cast<const double*>(prediction), slots, plan, weights, images, size, negative, positive,
                    static_cast<double*>(input), second, threads);
}
