/* The event simulator of the placement planner.
 *
 * engine.py generates the structs Problem, Work and State from its named tuples and puts them in
 * front of this file, so that both sides agree on every field; their meaning is written there. This
 * file and annealer.c are compiled as one.
 * Nothing is allocated here. Arithmetic must stay plain IEEE (no contraction, no reassociation):
 * whether two events fall on one instant decides what runs.
 */
#include <math.h>
#include <stdint.h>

enum { DONE = 0, STUCK = 1, CUT = 2 };

/* What a device starts: the first of its ready ops, exactly the next of its list, or the first of
 * the ready ops that its memory has room for now. */
enum { PRIORITY = 0, STRICT = 1, GATED = 2 };

static double transfer_seconds(const Problem *p, int m, int from, int to, double bytes) {
    return p->lat[from * m + to] + bytes / p->bw[from * m + to];
}

/* Longest path of compute and transfers from op u to the end, given those of its readers. */
static double bottom_level(const Problem *p, const int32_t *assign, const double *level, int u) {
    const int m = p->m, here = assign[u];
    double best = 0.0;
    for (int t = p->out_ptr[u]; t < p->out_ptr[u + 1]; t++) {
        for (int q = p->tensor_ptr[t]; q < p->tensor_ptr[t + 1]; q++) {
            const int v = p->pair_dst[q], there = assign[v];
            double x = level[v];
            if (there != here) x += transfer_seconds(p, m, here, there, p->tensor_bytes[t]);
            if (x > best) best = x;
        }
    }
    return best + p->time[(int64_t)u * m + here];
}

/* The longest of all paths: one that begins at a source, and those lead the order. */
static double longest_path(const Problem *p, const double *level) {
    double longest = 0.0;
    for (int k = 0; k < p->n; k++) {
        const int u = p->topo[k];
        if (p->in_ptr[u] < p->in_ptr[u + 1]) break;
        if (level[u] > longest) longest = level[u];
    }
    return longest;
}

/* Bottom levels of all ops; returns the longest of all. */
double plait_bottom_levels(const Problem *p, const int32_t *assign, double *level) {
    for (int k = p->n - 1; k >= 0; k--)
        level[p->topo[k]] = bottom_level(p, assign, level, p->topo[k]);
    return longest_path(p, level);
}

/* Ready ops: a heap for each device, largest priority first, the lower number among equals. */
static int before(const double *priority, int a, int b) {
    return priority[a] > priority[b] || (priority[a] == priority[b] && a < b);
}

static void push_ready(int32_t *heap, int32_t *size, int op, const double *priority) {
    int k = (*size)++;
    while (k > 0) {
        const int parent = (k - 1) >> 1;
        if (before(priority, heap[parent], op)) break;
        heap[k] = heap[parent];
        k = parent;
    }
    heap[k] = op;
}

static int pop_ready(int32_t *heap, int32_t *size, const double *priority) {
    const int first = heap[0], count = --(*size), op = heap[count];
    int k = 0;
    for (;;) {
        int child = 2 * k + 1;
        if (child >= count) break;
        if (child + 1 < count && before(priority, heap[child + 1], heap[child])) child++;
        if (!before(priority, heap[child], op)) break;
        heap[k] = heap[child];
        k = child;
    }
    heap[k] = op;
    return first;
}

/* The first ready op that takes at most `room` bytes, or with `forced` the one that takes least; -1
 * where there is none. `aside` has room for all of them. */
static int pop_fitting(const Problem *p, int32_t *heap, int32_t *size, const double *priority,
                       double room, int forced, int32_t *aside) {
    int count = 0, found = -1;
    double least = INFINITY;
    while (*size && (forced || found < 0)) {
        const int i = pop_ready(heap, size, priority);
        const double need = p->out[i] + p->temp[i];
        if (forced ? need < least : need <= room) {
            if (found >= 0) aside[count++] = found;
            found = i;
            least = need;
        } else {
            aside[count++] = i;
        }
    }
    while (count) push_ready(heap, size, aside[--count], priority);
    return found;
}

static void push_event(double *time, int32_t *id, int size, double when, int what) {
    int k = size;
    while (k > 0) {
        const int parent = (k - 1) >> 1;
        if (time[parent] <= when) break;
        time[k] = time[parent];
        id[k] = id[parent];
        k = parent;
    }
    time[k] = when;
    id[k] = what;
}

static void pop_event(double *time, int32_t *id, int size) {
    const double when = time[--size];
    const int what = id[size];
    int k = 0;
    for (;;) {
        int child = 2 * k + 1;
        if (child >= size) break;
        if (child + 1 < size && time[child + 1] < time[child]) child++;
        if (time[child] >= when) break;
        time[k] = time[child];
        id[k] = id[child];
        k = child;
    }
    time[k] = when;
    id[k] = what;
}

/* Puts a device on a list once. */
static void add(int32_t *list, int32_t *there, int *count, int device) {
    if (there[device]) return;
    there[device] = 1;
    list[(*count)++] = device;
}

static double excess(const Problem *p, int d, double from, double to) {
    const double low = from > p->cap[d] ? from : p->cap[d];
    return to > low ? (to - low) / (p->cap[d] > 1.0 ? p->cap[d] : 1.0) : 0.0;
}

/* Peak bytes above capacity after a simulation, as shares of it, added over the devices. */
static double overrun(const Problem *p, const Work *w) {
    double over = 0.0;
    for (int d = 0; d < p->m; d++) over += excess(p, d, 0.0, w->top[d]);
    return over;
}

/* The same in the static model, which needs no schedule. */
static double static_overrun(const Problem *p, Work *w, const int32_t *assign) {
    for (int d = 0; d < p->m; d++) w->top[d] = 0.0;
    for (int i = 0; i < p->n; i++) w->top[assign[i]] += p->param[i] + (p->temp[i] + p->out[i]);
    return overrun(p, w);
}

/* Plays one step. The cost is the makespan plus `weight` times the overrun of memory; CUT as soon
 * as it must come out above `limit`: what is left of a path (w->level holds bottom levels) or of a
 * device's work takes longer. A device starts its ready op of largest priority; when STRICT, only
 * the op whose position is the number it has started; when GATED, only ops that there is room for,
 * unless nothing else is under way anywhere. */
int plait_simulate(const Problem *problem, Work *work, const int32_t *assign,
                   const double *priority, const int32_t *position, int strict, double weight,
                   double limit, double *cost) {
    /* Copies, which no store below can be thought to change: pointers stay in registers. */
    const Problem problem_here = *problem, *p = &problem_here;
    const Work work_here = *work, *w = &work_here;
    const int n = p->n, m = p->m, dynamic = !p->is_static;
    int events = 0, started = 0, sent = 0, wakes = m, grew = 0, forced = -1;
    double now = 0.0, makespan = 0.0, over = 0.0, longest = 0.0;
    *cost = INFINITY;
    for (int d = 0; d < m; d++) {
        w->current[d] = w->left[d] = 0.0;
        w->running[d] = -1;
        w->ran[d] = w->ready_len[d] = w->ready_ptr[d + 1] = 0;
        w->wake[d] = d; /* devices that may have something to start */
        w->woken[d] = 1;
        w->grown[d] = 0;
    }
    w->ready_ptr[0] = 0;
    for (int i = 0; i < n; i++) {
        const int d = assign[i];
        w->ready_ptr[d + 1]++;
        w->left[d] += p->time[(int64_t)i * m + d];
        w->missing[i] = p->in_ptr[i + 1] - p->in_ptr[i];
        w->current[d] += dynamic ? p->param[i] : p->param[i] + (p->temp[i] + p->out[i]);
    }
    for (int d = 0; d < m; d++) {
        w->ready_ptr[d + 1] += w->ready_ptr[d];
        w->top[d] = w->current[d];
        over += excess(p, d, 0.0, w->top[d]);
        w->left[d] *= 1 - 1e-12; /* sums of another order must not be above the makespan */
        if (w->left[d] > longest) longest = w->left[d];
    }
    for (int link = 0; link < m * m; link++) {
        w->head[link] = -1;
        w->free[link] = 0.0;
    }
    w->counts[0] = w->counts[1] = 0;
    if (longest + weight * over > limit) return CUT;
    for (int i = 0; i < n; i++)
        if (!w->missing[i])
            push_ready(w->ready + w->ready_ptr[assign[i]], w->ready_len + assign[i], i, priority);
    for (;;) {
        for (int k = 0; k < wakes; k++) { /* start what can start at this instant */
            const int d = w->wake[k];
            w->woken[d] = 0;
            if (w->running[d] >= 0 || !w->ready_len[d]) continue;
            int32_t *heap = w->ready + w->ready_ptr[d];
            int i;
            if (strict == GATED && dynamic) {
                i = pop_fitting(p, heap, w->ready_len + d, priority, p->cap[d] - w->current[d],
                                d == forced, w->sequence + started);
                if (i < 0) continue;
                forced = -1;
            } else {
                if (strict == STRICT && position[heap[0]] != w->ran[d]) continue;
                i = pop_ready(heap, w->ready_len + d, priority);
            }
            const double seconds = p->time[(int64_t)i * m + d], done = now + seconds;
            const double rest = w->left[d] > w->level[i] ? w->left[d] : w->level[i];
            if (now + rest + weight * over > limit) return CUT;
            w->left[d] -= seconds;
            w->ran[d]++;
            w->running[d] = i;
            w->start[i] = now;
            w->end[i] = done;
            w->sequence[started++] = i;
            push_event(w->event_time, w->event_id, events++, done, d);
            if (dynamic) {
                w->current[d] += p->out[i] + p->temp[i];
                add(w->grow, w->grown, &grew, d);
            }
        }
        wakes = 0;
        if (!events && strict == GATED && started < n) { /* all wait for memory */
            double least = INFINITY;
            for (int d = 0; d < m; d++) {
                if (!w->ready_len[d]) continue;
                const double share = w->current[d] / (p->cap[d] > 1.0 ? p->cap[d] : 1.0);
                if (share < least) {
                    least = share;
                    forced = d;
                }
            }
            if (forced >= 0) {
                add(w->wake, w->woken, &wakes, forced);
                continue;
            }
        }
        if (!events) break;
        if (w->event_time[0] > now) { /* time moves on: this instant's frees are in */
            for (int k = 0; k < grew; k++) {
                const int d = w->grow[k];
                w->grown[d] = 0;
                if (w->current[d] <= w->top[d]) continue;
                over += excess(p, d, w->top[d], w->current[d]);
                w->top[d] = w->current[d];
            }
            grew = 0;
        }
        now = w->event_time[0];
        if (strict == GATED) /* whatever ends may make room */
            for (int d = 0; d < m; d++) add(w->wake, w->woken, &wakes, d);
        while (events && w->event_time[0] == now) {
            const int what = w->event_id[0];
            pop_event(w->event_time, w->event_id, events--);
            if (what >= m) { /* a transfer ends */
                const int link = what - m, here = link / m, there = link % m;
                const int x = w->head[link], t = w->transfer_tensor[x], u = p->tensor_src[t];
                if (!--w->holds[u] && !p->keep[u] && dynamic) w->current[here] -= p->out[u];
                const int y = w->waits[x];
                w->head[link] = y;
                if (y >= 0) {
                    push_event(w->event_time, w->event_id, events++, w->transfer_end[y], what);
                    if (dynamic) {
                        w->current[there] += p->tensor_bytes[w->transfer_tensor[y]];
                        add(w->grow, w->grown, &grew, there);
                    }
                }
                add(w->wake, w->woken, &wakes, there);
                for (int q = p->tensor_ptr[t]; q < p->tensor_ptr[t + 1]; q++) {
                    const int v = p->pair_dst[q];
                    if (assign[v] == there && !--w->missing[v])
                        push_ready(w->ready + w->ready_ptr[there], w->ready_len + there, v,
                                   priority);
                }
                continue;
            }
            const int d = what, i = w->running[d]; /* an op ends */
            w->running[d] = -1;
            add(w->wake, w->woken, &wakes, d);
            makespan = now;
            if (dynamic) {
                w->current[d] -= p->temp[i];
                for (int k = p->in_ptr[i]; k < p->in_ptr[i + 1]; k++) {
                    const int q = p->in_pair[k], x = w->pair_transfer[q], u = p->pair_src[q];
                    if (x >= 0) {
                        if (!--w->copy_holds[x]) w->current[d] -= p->tensor_bytes[p->pair_tensor[q]];
                    } else if (!--w->holds[u] && !p->keep[u]) {
                        w->current[d] -= p->out[u];
                    }
                }
            }
            int holds = 0;
            for (int t = p->out_ptr[i]; t < p->out_ptr[i + 1]; t++) {
                const int first = sent;
                for (int q = p->tensor_ptr[t]; q < p->tensor_ptr[t + 1]; q++) {
                    const int v = p->pair_dst[q], there = assign[v];
                    if (there == d) {
                        w->pair_transfer[q] = -1;
                        holds++;
                        if (!--w->missing[v])
                            push_ready(w->ready + w->ready_ptr[d], w->ready_len + d, v, priority);
                        continue;
                    }
                    const int link = d * m + there;
                    int x = first;
                    while (x < sent && w->transfer_link[x] != link) x++;
                    if (x == sent) {
                        const double begin = now > w->free[link] ? now : w->free[link];
                        const double seconds =
                            transfer_seconds(p, m, d, there, p->tensor_bytes[t]);
                        sent++;
                        holds++;
                        w->free[link] = begin + seconds;
                        w->transfer_tensor[x] = t;
                        w->transfer_link[x] = link;
                        w->transfer_start[x] = begin;
                        w->transfer_end[x] = begin + seconds;
                        w->copy_holds[x] = 0;
                        w->waits[x] = -1;
                        if (w->head[link] < 0) {
                            w->head[link] = x;
                            push_event(w->event_time, w->event_id, events++, begin + seconds,
                                       m + link);
                            if (dynamic) {
                                w->current[there] += p->tensor_bytes[t];
                                add(w->grow, w->grown, &grew, there);
                            }
                        } else {
                            w->waits[w->tail[link]] = x;
                        }
                        w->tail[link] = x;
                    }
                    w->pair_transfer[q] = x;
                    w->copy_holds[x]++;
                }
            }
            w->holds[i] = holds;
            if (!holds && !p->keep[i] && dynamic) w->current[d] -= p->out[i];
        }
    }
    w->counts[0] = started;
    w->counts[1] = sent;
    if (started < n) return STUCK;
    *cost = makespan + weight * over;
    return DONE;
}

/* Largest load of a device or a link for one input, seconds. */
double plait_pipeline_load(const Problem *p, const int32_t *assign, double *load) {
    const int m = p->m;
    double most = 0.0;
    for (int k = 0; k < m + m * m; k++) load[k] = 0.0;
    for (int i = 0; i < p->n; i++) load[assign[i]] += p->time[(int64_t)i * m + assign[i]];
    for (int t = 0; t < p->tensors; t++) {
        const int here = assign[p->tensor_src[t]], low = p->tensor_ptr[t];
        for (int q = low; q < p->tensor_ptr[t + 1]; q++) {
            const int there = assign[p->pair_dst[q]];
            int r = low;
            while (r < q && assign[p->pair_dst[r]] != there) r++;
            if (there != here && r == q)
                load[m + here * m + there] +=
                    transfer_seconds(p, m, here, there, p->tensor_bytes[t]);
        }
    }
    for (int k = 0; k < m + m * m; k++)
        if (load[k] > most) most = load[k];
    return most;
}
