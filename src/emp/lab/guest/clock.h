/* ---- the clock: whether the wall clock has ever gone back ------------------------------------------------------------
   Both clocks stand while the guest does, and run at one rate: their difference changes when the wall clock is set, and
   only then. It is read between two readings of the other clock, so that it lies between two bounds, however long a
   reading took. What is certain of an earlier one and impossible now is a step back. */

enum { CLOCK_SAMPLE_US = 2000 };
static struct { int64_t first_ns, low_ns, stepped_back_ns; uint64_t samples; bool watched; } wall;
static pthread_mutex_t wall_lock = PTHREAD_MUTEX_INITIALIZER;

static int64_t now_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void wall_sample(void)
{
    int64_t before = now_ns(CLOCK_MONOTONIC), real = now_ns(CLOCK_REALTIME), after = now_ns(CLOCK_MONOTONIC);
    int64_t low = real - after, high = real - before;
    if (!wall.samples++)
        wall.first_ns = wall.low_ns = low;
    if (high < wall.low_ns && wall.low_ns - high > wall.stepped_back_ns)
        wall.stepped_back_ns = wall.low_ns - high;
    if (low > wall.low_ns)
        wall.low_ns = low;
}

static void *wall_watch(void *unused)
{
    for (;; sleep_us(CLOCK_SAMPLE_US)) {
        pthread_mutex_lock(&wall_lock);
        wall_sample();
        pthread_mutex_unlock(&wall_lock);
    }
    return unused;
}

/* `clock`: the time, and how it was set; from the first `clock watch` on it is looked at all the time. `clock set NS` sets
   it, back too: for tests. */
static void cmd_clock(struct buf *out, int argc, char **argv)
{
    pthread_t thread;
    int64_t ns = argc == 3 ? atoll(argv[2]) : 0;
    struct timespec wanted = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    if (argc > 1 && strcmp(argv[1], "watch") && (strcmp(argv[1], "set") || ns <= 0)) {
        put(out, "{\"error\": \"usage: clock [watch | set NS]\"}");
        return;
    }
    if (ns > 0 && clock_settime(CLOCK_REALTIME, &wanted)) {
        put(out, "{\"error\": \"%s\"}", strerror(errno));
        return;
    }
    pthread_mutex_lock(&wall_lock);
    if (argc == 2 && !wall.watched && !pthread_create(&thread, NULL, wall_watch, NULL))
        wall.watched = pthread_detach(thread) == 0;
    wall_sample();
    put(out, "{\"samples\": %llu, \"watched\": %s, \"stepped_back_us\": %lld, \"stepped_ahead_us\": %lld, \"realtime_ns\": %lld}",
        (unsigned long long)wall.samples, wall.watched ? "true" : "false", (long long)wall.stepped_back_ns / 1000,
        (long long)(wall.low_ns - wall.first_ns) / 1000, (long long)now_ns(CLOCK_REALTIME));
    pthread_mutex_unlock(&wall_lock);
}
