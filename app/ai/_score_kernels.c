/* The loops of scoring, over the flat arrays that score_kernels.py lays out.
 *
 * Plain C99 without Python's headers: a shared library that ctypes opens, so that other threads run during a
 * call. The caller has checked every index and every shape; nothing here looks again.
 *
 * Every row adds its terms in one order, whatever rows stand beside it, and in scikit-learn's order: compiled
 * without contraction into fused operations (-ffp-contract=off) the sums are equal to the last bit. */

#include <float.h>
#include <stdint.h>
#include <stdlib.h>

enum {
    LANES = 16,      /* walks that go on side by side: their steps do not wait for each other */
    BLOCK_ROWS = 512 /* rows that stay in the cache while all trees pass over them */
};

/* A value up to the threshold goes to child[0], a greater one to child[1], a NaN to child[nan_child].
 * A leaf holds its value in `threshold` and is its own child, so a walk of fixed length may go on there. */
struct node {
    double threshold;
    int32_t child[2];
    int32_t feature;
    int32_t nan_child;
};

const int32_t node_bytes = sizeof(struct node);

static inline double round_to_single(double value) {
    /* A huge value stays a value instead of becoming an infinity. */
    if (value > FLT_MAX) return FLT_MAX;
    if (value < -FLT_MAX) return -FLT_MAX;
    return (float)value;
}

/* Copies rows so that neighbouring features stand `feature_step` apart and neighbouring rows `row_step`. */
static void copy_rows(const double *rows, int64_t n_rows, int64_t n_features, int32_t single, double *copy,
                      int64_t feature_step, int64_t row_step) {
    for (int64_t row = 0; row < n_rows; row++) {
        for (int64_t feature = 0; feature < n_features; feature++) {
            double value = rows[row * n_features + feature];
            copy[feature * feature_step + row * row_step] = single ? round_to_single(value) : value;
        }
    }
}

/* Walks `depth` steps from LANES nodes side by side; `at` says where each begins, and then where it is. */
static inline void walk(const struct node *nodes, int32_t *at, int32_t depth, const double *values,
                        int64_t feature_step, int64_t lane_step) {
    for (int32_t level = 0; level < depth; level++) {
        for (int64_t lane = 0; lane < LANES; lane++) {
            const struct node *node = nodes + at[lane];
            double value = values[node->feature * feature_step + lane * lane_step];
            /* No branch: which way a row goes is as good as random. */
            at[lane] = node->child[(value > node->threshold) | ((value != value) & node->nan_child)];
        }
    }
}

/* Adds one tree's leaves to the sums of the LANES rows of a panel. */
static void add_tree(const struct node *nodes, int32_t root, int32_t depth, const double *panel,
                     double *sums) {
    int32_t at[LANES];
    for (int lane = 0; lane < LANES; lane++) at[lane] = root;
    walk(nodes, at, depth, panel, LANES, 1);
    for (int lane = 0; lane < LANES; lane++) sums[lane] += nodes[at[lane]].threshold;
}

/* Returns `sum` and all trees' leaves of one row, added in the order of the trees, LANES of which are walked
 * side by side: a single row would otherwise wait for memory at every step. */
static double add_trees(const struct node *nodes, const int32_t *roots, const int32_t *depths,
                        int64_t n_trees, const double *row, double sum) {
    for (int64_t first = 0; first < n_trees; first += LANES) {
        int32_t at[LANES], depth = 0;
        for (int64_t lane = 0; lane < LANES; lane++) {
            int64_t tree = first + lane < n_trees ? first + lane : first;
            at[lane] = roots[tree];
            if (depths[tree] > depth) depth = depths[tree];
        }
        walk(nodes, at, depth, row, 1, 0);
        int64_t count = n_trees - first < LANES ? n_trees - first : LANES;
        for (int64_t lane = 0; lane < count; lane++) sum += nodes[at[lane]].threshold;
    }
    return sum;
}

/* Adds to sums (n_rows) the leaves that rows (n_rows, n_features) reach, in the order of the trees, whose
 * deepest leaves are `depths` steps from their roots. With `single` values are rounded to single precision
 * first. Returns -1 without memory, else 0. */
int32_t sum_trees(const struct node *nodes, const int32_t *roots, const int32_t *depths, int64_t n_trees,
                  const double *rows, int64_t n_rows, int64_t n_features, int32_t single, double *sums) {
    int64_t most_rows = n_rows < BLOCK_ROWS ? n_rows : BLOCK_ROWS;
    double *copy = malloc((size_t)(most_rows * n_features) * sizeof(double) + 1);
    if (copy == NULL) return -1;
    int64_t done = 0;
    while (n_rows - done >= LANES) {
        int64_t block_rows = n_rows - done < BLOCK_ROWS ? (n_rows - done) / LANES * LANES : BLOCK_ROWS;
        for (int64_t row = 0; row < block_rows; row += LANES) {
            copy_rows(rows + (done + row) * n_features, LANES, n_features, single, copy + row * n_features,
                      LANES, 1);
        }
        for (int64_t tree = 0; tree < n_trees; tree++) {
            for (int64_t row = 0; row < block_rows; row += LANES) {
                add_tree(nodes, roots[tree], depths[tree], copy + row * n_features, sums + done + row);
            }
        }
        done += block_rows;
    }
    for (; done < n_rows; done++) {
        copy_rows(rows + done * n_features, 1, n_features, single, copy, 1, 0);
        sums[done] = add_trees(nodes, roots, depths, n_trees, copy, sums[done]);
    }
    free(copy);
    return 0;
}

/* Adds to sums (n_rows) the weighted features of rows (n_rows, n_features), feature by feature, after
 * n_scalings times taking a mean away and dividing by a scale, both (n_scalings, n_features). */
void sum_terms(const double *means, const double *scales, int64_t n_scalings, const double *weights,
               const double *rows, int64_t n_rows, int64_t n_features, double *sums) {
    for (int64_t row = 0; row < n_rows; row++) {
        double total = sums[row];
        for (int64_t feature = 0; feature < n_features; feature++) {
            double value = rows[row * n_features + feature];
            for (int64_t i = feature; i < n_scalings * n_features; i += n_features) {
                value = (value - means[i]) / scales[i];
            }
            total += value * weights[feature];
        }
        sums[row] = total;
    }
}
