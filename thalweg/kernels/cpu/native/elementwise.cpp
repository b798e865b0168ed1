// RMSNorm over rows, and the rotation of their last channels.
#include "kernels.h"
#include "streams.h"

using namespace thalweg;

namespace {

constexpr double SPLIT_FROM = 200e3;  // elements below which a second thread costs more than it brings

}  // namespace

extern "C" {

// out = weight * x / sqrt(mean(x^2) + eps); weight 0: ones.
void thalweg_rms_norm(const float* x, const float* weight, long rows, long width, float eps, float* out,
                      long threads) {
    const bool split = threads > 1 && (double)rows * width > SPLIT_FROM;
#pragma omp parallel for schedule(static) num_threads(threads) if (split)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * width, scale = 1.0f / std::sqrt(mean_square(from, width) + eps);
        float* to = out + row * width;
        for (long i = 0; i < width; i += LANES) {
            floats v = load_some(from + i, width - i) * scale;
            if (weight != nullptr) v *= load_some(weight + i, width - i);
            store_some(to + i, v, width - i);
        }
    }
}

// Turns pairs of the last 2 * pairs channels of each row by cos and sin [tokens, pairs].
void thalweg_rotate(float* x, const float* cosines, const float* sines, long tokens, long heads, long width,
                    long pairs, long threads) {
    const bool split = threads > 1 && (double)tokens * heads * pairs > SPLIT_FROM;
#pragma omp parallel for schedule(static) num_threads(threads) if (split)
    for (long row = 0; row < tokens * heads; row++) {
        const float *c = cosines + row / heads * pairs, *s = sines + row / heads * pairs;
        float* turned = x + (row + 1) * width - 2 * pairs;
        for (long i = 0; i < pairs; i++, turned += 2) {
            const float a = turned[0], b = turned[1];
            turned[0] = a * c[i] - b * s[i];
            turned[1] = a * s[i] + b * c[i];
        }
    }
}
}
