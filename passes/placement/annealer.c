/* The annealer of the placement planner: moves on a placement, judged by simulator.c, which comes
 * before this file.
 */

/* Cost of the state's current placement, whose levels and priorities are known; infinite where it
 * exceeds `limit`. */
static double evaluate(const Problem *p, Work *w, State *s, double weight, double limit) {
    double load = 0.0, cost;
    if (!s->throughput) {
        if (longest_path(p, w->level) > limit) return INFINITY;
        plait_simulate(p, w, s->assign, s->priority, s->position, s->mode, weight, limit, &cost);
        cost += *s->price * w->counts[1];
        return cost <= limit ? cost : INFINITY;
    }
    load = plait_pipeline_load(p, s->assign, w->load);
    if (load > limit) return INFINITY;
    if (p->is_static && load + weight * static_overrun(p, w, s->assign) > limit) return INFINITY;
    /* Only peaks of memory matter, not the makespan. */
    plait_simulate(p, w, s->assign, s->priority, s->position, s->mode, weight, INFINITY, &cost);
    cost = load + weight * overrun(p, w) + *s->price * w->counts[1];
    return cost <= limit ? cost : INFINITY;
}

/* Plays the schedule just simulated, in which devices wait for memory, as lists to be kept to: the
 * cost without overruns, infinite where lists alone make nobody wait long enough. */
static double as_lists(const Problem *p, Work *w, State *s) {
    double cost;
    for (int d = 0; d < p->m; d++) w->ran[d] = 0;
    for (int k = 0; k < p->n; k++) {
        const int i = w->sequence[k];
        s->turn[i] = w->ran[s->assign[i]]++;
        s->list[i] = -(double)s->turn[i];
    }
    const int code = plait_simulate(p, w, s->assign, s->list, s->turn, STRICT, 0.0, INFINITY, &cost);
    if (code != DONE || overrun(p, w) > 0.0) return INFINITY;
    if (s->throughput) cost = plait_pipeline_load(p, s->assign, w->load);
    return cost + *s->price * w->counts[1];
}

/* Takes over the schedule just simulated: sequences, critical path, and the best so far. */
static void accept(const Problem *p, Work *w, State *s) {
    const int n = p->n, m = p->m;
    int last = 0, count = 0;
    for (int d = 0; d <= m; d++) s->sequence_ptr[d] = w->ready_ptr[d];
    for (int d = 0; d < m; d++) w->ran[d] = s->sequence_ptr[d];
    for (int k = 0; k < n; k++) {
        const int i = w->sequence[k], d = s->assign[i];
        s->sequence[w->ran[d]] = i;
        s->position[i] = w->ran[d]++;
        if (w->end[i] > w->end[last]) last = i;
    }
    for (int i = last; i >= 0;) {
        const double begin = w->start[i];
        int from = -1;
        s->critical[count++] = i;
        if (begin > 0.0 && count < n) {
            for (int k = p->in_ptr[i]; k < p->in_ptr[i + 1] && from < 0; k++) {
                const int q = p->in_pair[k], x = w->pair_transfer[q];
                const int u = p->pair_src[q];
                if ((x >= 0 ? w->transfer_end[x] : w->end[u]) == begin) from = u;
            }
            if (from < 0 && s->position[i] > s->sequence_ptr[s->assign[i]])
                from = s->sequence[s->position[i] - 1];
        }
        i = from;
    }
    s->counts[0] = count;
    if (s->cost[0] < s->cost[1] && overrun(p, w) == 0.0) {
        const double cost = s->mode == GATED ? as_lists(p, w, s) : s->cost[0];
        if (!(cost < s->cost[1])) return;
        s->cost[1] = cost;
        *s->best_mode = s->mode;
        for (int i = 0; i < n; i++) {
            s->best_assign[i] = s->assign[i];
            s->best_offset[i] = s->offset[i];
        }
        s->counts[3]++;
    }
}

/* Levels and priorities of the state's placement, all made anew. */
static void rank_all(const Problem *p, Work *w, State *s) {
    plait_bottom_levels(p, s->assign, w->level);
    for (int i = 0; i < p->n; i++) s->priority[i] = w->level[i] + s->offset[i];
}

/* Makes the current placement the state; its cost, or infinity (and no change) above `limit`. */
double plait_settle(const Problem *p, Work *w, State *s, double weight, double limit) {
    rank_all(p, w, s);
    const double cost = evaluate(p, w, s, weight, limit);
    if (cost < INFINITY) {
        s->cost[0] = cost;
        accept(p, w, s);
    }
    return cost;
}

/* splitmix64 (Steele et al., 2014): the same moves on every machine. */
static uint64_t next(State *s) {
    uint64_t z = (*s->random += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

static double uniform(State *s) { return (next(s) >> 11) * 0x1.0p-53; }

static int below(State *s, int count) { return (int)(next(s) % (uint64_t)count); }

static int random_op(const Problem *p, State *s, int unit) {
    return p->unit_op[p->unit_ptr[unit] + below(s, p->unit_ptr[unit + 1] - p->unit_ptr[unit])];
}

static int device_of(const Problem *p, const State *s, int unit) {
    return s->assign[p->unit_op[p->unit_ptr[unit]]];
}

/* The device of a random neighbour of op i; now and then, or without neighbours, any device. */
static int near_device(const Problem *p, State *s, int i) {
    const int ins = p->in_ptr[i + 1] - p->in_ptr[i];
    const int low = p->tensor_ptr[p->out_ptr[i]];
    const int outs = p->tensor_ptr[p->out_ptr[i + 1]] - low;
    const int k = below(s, ins + outs + 1);
    if (k < ins) return s->assign[p->pair_src[p->in_pair[p->in_ptr[i] + k]]];
    if (k < ins + outs) return s->assign[p->pair_dst[low + k - ins]];
    return below(s, p->m);
}

/* Where devices differ in what they are good at, now and then the one that runs op i soonest;
 * else the one given. */
static int apt_device(const Problem *p, State *s, int i, int device) {
    const double *time = p->time + (int64_t)i * p->m;
    if (!p->uneven || uniform(s) < 0.7) return device;
    device = 0;
    for (int d = 1; d < p->m; d++)
        if (time[d] < time[device]) device = d;
    return device;
}

/* Puts a unit on a device if it may run there and does not yet; returns the count of moved. */
static int shift(const Problem *p, State *s, int unit, int device, int count) {
    const int old = device_of(p, s, unit);
    if (old == device || !p->allowed[(int64_t)unit * p->m + device]) return count;
    s->moved[count] = unit;
    s->old_device[count] = old;
    for (int k = p->unit_ptr[unit]; k < p->unit_ptr[unit + 1]; k++)
        s->assign[p->unit_op[k]] = device;
    return count + 1;
}

/* One change of assignment; returns how many units moved. */
static int change_devices(const Problem *p, State *s) {
    const int m = p->m;
    const double kind = uniform(s);
    int moved = 0;
    if (kind < 0.15) { /* any unit */
        const int u = below(s, p->units), i = random_op(p, s, u);
        int d = near_device(p, s, i);
        if (uniform(s) < 0.3) d = below(s, m);
        return shift(p, s, u, apt_device(p, s, i, d), 0);
    }
    if (kind < 0.35) { /* a unit on the critical path */
        const int i = s->critical[below(s, s->counts[0])];
        int d = near_device(p, s, i);
        if (d == s->assign[i] || uniform(s) < 0.3) d = below(s, m);
        return shift(p, s, p->unit[i], apt_device(p, s, i, d), 0);
    }
    if (kind < 0.5 && p->pairs) { /* one end of a transfer to the other */
        int i = 0, j = 0;
        for (int tries = 0; tries < 8; tries++) {
            const int q = below(s, p->pairs);
            i = p->pair_src[q];
            j = p->pair_dst[q];
            if (s->assign[i] != s->assign[j]) break;
        }
        if (uniform(s) < 0.5) return shift(p, s, p->unit[i], s->assign[j], 0);
        return shift(p, s, p->unit[j], s->assign[i], 0);
    }
    if (kind < 0.75 && p->regions) { /* a cluster, whole or what of it is on one device */
        const int r = below(s, p->regions), low = p->region_ptr[r], high = p->region_ptr[r + 1];
        const int i = random_op(p, s, p->region_unit[low + below(s, high - low)]);
        const int source = s->assign[i], whole = uniform(s) < 0.5;
        int d = near_device(p, s, i);
        if (d == source || uniform(s) < 0.3) d = below(s, m);
        for (int k = low; k < high; k++) {
            const int u = p->region_unit[k];
            if (whole || device_of(p, s, u) == source) moved = shift(p, s, u, d, moved);
        }
        return moved;
    }
    if (kind < 0.95) { /* a window of a linear order, often to what lies next to it */
        const int64_t row = (int64_t)below(s, p->orders) * p->units;
        int middle = below(s, p->units);
        if (uniform(s) < 0.5)
            middle = p->place[row + p->unit[s->critical[below(s, s->counts[0])]]];
        const double widest = p->units > 2 * m ? (double)p->units / m : 2.0;
        const int size = (int)pow(widest, uniform(s));
        const int first = middle - below(s, size + 1), low = first > 0 ? first : 0;
        const int high = low + size + 1 < p->units ? low + size + 1 : p->units;
        const int source = device_of(p, s, p->order[row + middle]), whole = uniform(s) < 0.5;
        const int edge = uniform(s) < 0.5 ? low - 1 : high;
        int d = below(s, m);
        if (edge >= 0 && edge < p->units && uniform(s) < 0.6)
            d = device_of(p, s, p->order[row + edge]);
        for (int k = low; k < high; k++) {
            const int u = p->order[row + k];
            if (whole || device_of(p, s, u) == source) moved = shift(p, s, u, d, moved);
        }
        return moved;
    }
    const int u = below(s, p->units), v = below(s, p->units); /* two units change places */
    const int d = device_of(p, s, u), e = device_of(p, s, v);
    if (d == e || !p->allowed[(int64_t)u * m + e] || !p->allowed[(int64_t)v * m + d]) return 0;
    return shift(p, s, v, d, shift(p, s, u, e, 0));
}

/* Puts an op, or a few in a row, right before or behind another of its device; how many. */
static int change_order(const Problem *p, Work *w, State *s) {
    const int i = uniform(s) < 0.6 ? s->critical[below(s, s->counts[0])] : below(s, p->n);
    const int low = s->sequence_ptr[s->assign[i]], high = s->sequence_ptr[s->assign[i] + 1];
    const int later = uniform(s) < 0.4, one = uniform(s) < 0.7;
    const int far = 1 + (int)(-log(1.0 - uniform(s)) * (1.0 + (high - low) * 0.02));
    int k = s->position[i] + (later ? far : -far), count = 0;
    k = k < low ? low : k >= high ? high - 1 : k;
    const int j = s->sequence[k];
    if (i == j) return 0;
    const double nudge = (later ? -1e-9 : 1e-9) * s->cost[0];
    const double change = s->priority[j] - s->priority[i] + nudge;
    const int reach = one ? 1 : 1 + below(s, 8);
    for (k = s->position[i]; k < s->position[i] + reach && k < high; k++) {
        const int op = s->sequence[k];
        s->moved[count] = op;
        s->old_offset[count++] = s->offset[op];
        s->offset[op] += change;
        s->priority[op] = w->level[op] + s->offset[op];
    }
    return count;
}

static void mark(const Problem *p, State *s, int op) {
    const int k = p->topo_place[op];
    s->dirty[k >> 6] |= 1ull << (k & 63);
}

static void mark_sources(const Problem *p, State *s, int op) {
    for (int k = p->in_ptr[op]; k < p->in_ptr[op + 1]; k++)
        mark(p, s, p->pair_src[p->in_pair[k]]);
}

/* Levels and priorities after units moved, from readers to sources as far as anything changes.
 * Returns how many ops they changed for; `ranked` and `old_level` remember which, and what was. */
static int rank_moved(const Problem *p, Work *w, State *s, int units) {
    int count = 0;
    for (int j = 0; j < units; j++) {
        for (int k = p->unit_ptr[s->moved[j]]; k < p->unit_ptr[s->moved[j] + 1]; k++) {
            mark(p, s, p->unit_op[k]);
            mark_sources(p, s, p->unit_op[k]);
        }
    }
    for (int word = (p->n - 1) >> 6; word >= 0; word--) {
        while (s->dirty[word]) {
            const int bit = 63 - __builtin_clzll(s->dirty[word]);
            const int u = p->topo[64 * word + bit];
            const double level = bottom_level(p, s->assign, w->level, u);
            s->dirty[word] &= ~(1ull << bit);
            if (level == w->level[u]) continue;
            s->ranked[count] = u;
            s->old_level[count++] = w->level[u];
            w->level[u] = level;
            s->priority[u] = level + s->offset[u];
            mark_sources(p, s, u);
        }
    }
    return count;
}

/* Tries `steps` moves while the temperature falls geometrically from `hot` to `cold` seconds. */
void plait_anneal(const Problem *p, Work *w, State *s, int steps, double hot, double cold,
                  double weight, double order_share) {
    rank_all(p, w, s);
    for (int step = 0; step < steps; step++) {
        const double temperature = hot * pow(cold / hot, (double)step / steps);
        const double limit = s->cost[0] - temperature * log(1.0 - uniform(s));
        const int reorder = uniform(s) < order_share || p->m == 1;
        const int count = reorder ? change_order(p, w, s) : change_devices(p, s);
        if (!count) continue;
        s->counts[1]++;
        const int ranked = reorder ? 0 : rank_moved(p, w, s, count);
        const double cost = evaluate(p, w, s, weight, limit);
        if (cost < INFINITY) {
            s->counts[2]++;
            s->cost[0] = cost;
            accept(p, w, s);
            continue;
        }
        for (int k = count - 1; k >= 0; k--) {
            const int x = s->moved[k];
            if (reorder) {
                s->offset[x] = s->old_offset[k];
                s->priority[x] = w->level[x] + s->offset[x];
                continue;
            }
            for (int q = p->unit_ptr[x]; q < p->unit_ptr[x + 1]; q++)
                s->assign[p->unit_op[q]] = s->old_device[k];
        }
        for (int k = 0; k < ranked; k++) {
            const int i = s->ranked[k];
            w->level[i] = s->old_level[k];
            s->priority[i] = w->level[i] + s->offset[i];
        }
    }
}

/* Least start of each op, in an order of `order` that has what `near` names before it.
 *
 * If op v starts at t, a neighbour u whose data would come later than t from another device is on
 * v's own; and so on for neighbours of such ops. Together they run on one device before t. The
 * least t that does not contradict itself is a bound on the start of v. `least` holds least times,
 * `cost` the cheapest transfers by entry of the rows; `mark` is -1, `list` and `behind` scratch. */
void plait_heads(int n, const int32_t *order, const int32_t *ptr, const int32_t *near,
                 const double *cost, const double *least, const int32_t *unit, double *head,
                 int32_t *mark, int32_t *list, double *behind) {
    enum { MOST = 48 }; /* ops looked at together; any subset gives a valid bound */
    for (int k = 0; k < n; k++) {
        const int v = order[k];
        double t = 0.0;
        for (int q = ptr[v]; q < ptr[v + 1]; q++) {
            const double x = head[near[q]] + least[near[q]];
            if (x > t) t = x;
        }
        for (;;) {
            int count = 1;
            double leave = INFINITY, bound = 0.0, sum = 0.0;
            list[0] = v;
            behind[v] = 0.0;
            for (int j = 0; j < count; j++) {
                const int x = list[j];
                for (int q = ptr[x]; q < ptr[x + 1] && count <= MOST; q++) {
                    const int u = near[q], bound_to = unit[u] == unit[x];
                    const double come =
                        head[u] + least[u] + (bound_to ? 0.0 : cost[q]) + behind[x];
                    if (mark[u] == v || !(come > t || (bound_to && x == v))) continue;
                    mark[u] = v;
                    behind[u] = behind[x] + least[u];
                    if (!bound_to && come < leave) leave = come;
                    list[count++] = u;
                }
            }
            for (int j = 1; j < count; j++) mark[list[j]] = -1;
            for (int j = 2; j < count; j++) { /* by head, latest first */
                const int u = list[j];
                int i = j - 1;
                while (i >= 1 && head[list[i]] < head[u]) {
                    list[i + 1] = list[i];
                    i--;
                }
                list[i + 1] = u;
            }
            for (int j = 1; j < count; j++) {
                sum += least[list[j]];
                if (head[list[j]] + sum > bound) bound = head[list[j]] + sum;
            }
            if (bound <= t) break;
            if (bound < leave) {
                t = bound;
                break;
            }
            t = leave;
        }
        head[v] = t;
    }
}
