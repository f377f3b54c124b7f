/* ---- memory: pages whose contents follow from (run, index, round), rewritten in order at a set rate ------------- */

typedef uint64_t pair __attribute__((vector_size(16)));
struct page { uint64_t run, index, round, check; pair body[(PAGE_BYTES - 32) / 16]; };
enum { BODY = (PAGE_BYTES - 32) / 16, CHUNK = 16 };

/* `round` counts sweeps: pages below `next` carry `round`, the rest the one before. So a page that a migration left
 * stale is a mismatch, although it is consistent in itself. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    _Atomic int waiting; /* verifiers: the rewriter gives way to them */
    struct page *pages;
    uint64_t bytes, count, rate, run, round, next, achieved, verified, mismatches;
} memory = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static uint64_t mix(uint64_t x) /* the finaliser of splitmix64 */
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

static uint64_t page_seed(uint64_t run, uint64_t index, uint64_t round)
{
    return mix(run ^ mix(index * 0x9e3779b97f4a7c15 + mix(round + 1)));
}

static void page_fill(struct page *page, uint64_t run, uint64_t index, uint64_t round)
{
    uint64_t seed = page_seed(run, index, round), step = mix(seed) | 1;
    pair value = {seed, seed + step}, stride = {2 * step, 2 * step};
    page->run = run, page->index = index, page->round = round, page->check = step;
#pragma GCC unroll 8
    for (int i = 0; i < BODY; i++, value += stride)
        page->body[i] = value;
}

static bool page_ok(const struct page *page, uint64_t run, uint64_t index, uint64_t round)
{
    uint64_t seed = page_seed(run, index, round), step = mix(seed) | 1;
    pair value = {seed, seed + step}, stride = {2 * step, 2 * step}, bad = {0, 0};
#pragma GCC unroll 8
    for (int i = 0; i < BODY; i++, value += stride)
        bad |= page->body[i] ^ value;
    return page->run == run && page->index == index && page->round == round && page->check == step && !(bad[0] | bad[1]);
}

static void rewrite(uint64_t pages) /* with the lock held */
{
    for (; pages; pages--) {
        page_fill(&memory.pages[memory.next], memory.run, memory.next, memory.round);
        if (++memory.next == memory.count)
            memory.next = 0, memory.round++;
    }
}

static void *rewriter(void *unused)
{
    uint64_t last = 0, run = 0, window = 0, written = 0;
    double credit = 0; /* pages that are due */
    (void)unused;
    prctl(PR_SET_NAME, "memory");
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 10); /* echo first */
    pthread_mutex_lock(&memory.lock);
    for (;;) {
        while (!memory.pages || !memory.rate || !memory.round)
            pthread_cond_wait(&memory.changed, &memory.lock);
        uint64_t now = now_us(CLOCK_MONOTONIC);
        if (run != memory.run)
            run = memory.run, last = window = now, credit = 0, written = 0;
        double per_us = (double)memory.rate / PAGE_BYTES / 1e6;
        credit += per_us * (double)(now - last);
        if (credit > per_us * 50000 + CHUNK) /* after a stall there is no burst to make up for it */
            credit = per_us * 50000 + CHUNK;
        last = now;
        uint64_t pages = credit >= CHUNK ? CHUNK : (uint64_t)credit;
        rewrite(pages);
        credit -= (double)pages;
        written += pages;
        if (now - window >= 1000000) {
            memory.achieved = written * PAGE_BYTES * 1000000 / (now - window);
            window = now, written = 0;
        }
        uint64_t pause = credit >= 1 ? 0 : (uint64_t)((1 - credit) / per_us);
        pthread_mutex_unlock(&memory.lock);
        if (pause)
            sleep_us(pause < 2000 ? 2000 : pause > 100000 ? 100000 : pause);
        while (atomic_load(&memory.waiting))
            sched_yield();
        pthread_mutex_lock(&memory.lock);
    }
    return NULL;
}

static void memory_lock(void)
{
    atomic_fetch_add(&memory.waiting, 1);
    pthread_mutex_lock(&memory.lock);
    atomic_fetch_sub(&memory.waiting, 1);
}

static uint64_t available_bytes(void)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof line, f) && sscanf(line, "MemAvailable: %llu", &kib) != 1)
        ;
    if (f)
        fclose(f);
    return kib * 1024;
}

static void put_memory(struct buf *out)
{
    memory_lock();
    put(out, "{\"bytes\": %llu, \"rate_bytes_per_s\": {\"target\": %llu, \"achieved\": %llu}, \"rounds\": %llu, "
        "\"pages_verified\": %llu, \"mismatches\": %llu}", (unsigned long long)memory.bytes, (unsigned long long)memory.rate,
        (unsigned long long)(memory.rate ? memory.achieved : 0), (unsigned long long)memory.round,
        (unsigned long long)memory.verified, (unsigned long long)memory.mismatches);
    pthread_mutex_unlock(&memory.lock);
}

/* `memory BYTES RATE_BYTES_PER_S`: answered once every page has been filled for the first time. */
static void cmd_memory(struct buf *out, int argc, char **argv)
{
    char *end[2];
    uint64_t bytes = argc == 3 ? strtoull(argv[1], &end[0], 10) : 0, rate = argc == 3 ? strtoull(argv[2], &end[1], 10) : 0;
    if (argc != 3 || *end[0] || *end[1] || bytes % PAGE_BYTES || (!bytes && rate)) {
        put(out, "{\"error\": \"usage: memory BYTES RATE_BYTES_PER_S (BYTES a multiple of 4096, 0 0 stops)\"}");
        return;
    }
    memory_lock();
    if (memory.pages)
        munmap(memory.pages, memory.bytes);
    memory.pages = NULL;
    memory.bytes = memory.count = memory.rate = memory.round = memory.next = memory.achieved = 0;
    memory.verified = memory.mismatches = 0;
    if (bytes && bytes + (16 << 20) > available_bytes()) {
        put(out, "{\"error\": \"%llu bytes wanted, the guest has %llu available and 16 MiB stay free\"}",
            (unsigned long long)bytes, (unsigned long long)available_bytes());
    } else if (bytes) {
        void *pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);
        if (pages == MAP_FAILED) {
            put(out, "{\"error\": \"cannot lock %llu bytes: %s\"}", (unsigned long long)bytes, strerror(errno));
        } else {
            memory.pages = pages, memory.bytes = bytes, memory.count = bytes / PAGE_BYTES, memory.run = mix(now_us(CLOCK_REALTIME));
            while (!memory.round)
                rewrite(1);
            memory.rate = rate;
        }
    }
    pthread_cond_broadcast(&memory.changed);
    pthread_mutex_unlock(&memory.lock);
    if (!out->len)
        put_memory(out);
}

static void cmd_verify(struct buf *out, int argc, char **argv)
{
    uint64_t pages = 0, mismatches = 0, rounds = 0, run = 0;
    (void)argc, (void)argv;
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 10);
    for (bool more = true; more;) { /* in chunks: the rewriter goes on in between, which does no harm */
        memory_lock();
        if (run && run != memory.run)
            pages = mismatches = 0; /* restarted meanwhile: begin again */
        run = memory.run;
        for (int i = 0; i < CHUNK && pages < memory.count; i++, pages++)
            mismatches += !page_ok(&memory.pages[pages], run, pages, memory.round - (pages >= memory.next));
        rounds = memory.round;
        more = pages < memory.count;
        if (!more)
            memory.verified += pages, memory.mismatches += mismatches;
        pthread_mutex_unlock(&memory.lock);
    }
    put(out, "{\"pages\": %llu, \"mismatches\": %llu, \"rounds\": %llu}", (unsigned long long)pages,
        (unsigned long long)mismatches, (unsigned long long)rounds);
}

/* `corrupt [PAGE]` flips one byte, so that a checker can be seen to fail. Without rewriting it stays that way. */
static void cmd_corrupt(struct buf *out, int argc, char **argv)
{
    uint64_t page = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
    memory_lock();
    if (page < memory.count) {
        ((unsigned char *)&memory.pages[page])[PAGE_BYTES / 2] ^= 1;
        put(out, "{\"corrupted_page\": %llu}", (unsigned long long)page);
    } else {
        put(out, "{\"error\": \"no such page: memory holds %llu\"}", (unsigned long long)memory.count);
    }
    pthread_mutex_unlock(&memory.lock);
}
