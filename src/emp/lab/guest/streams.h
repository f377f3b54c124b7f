/* ---- streams: numbered datagrams one way, and TCP in bulk each way ----------------------------------------------- */

/* A datagram is one of the stream when it begins with the stream's id and its own number, both 64 bits, big-endian.
   `reordered` is RFC 4737's (section 3.3): its number is lower than the highest that came before. A duplicate is not. */
enum { SINK_NUMBERS = 1 << 24, SINK_MISSING = 16, BULK_BYTES = 65521 };
static pthread_mutex_t sink_lock = PTHREAD_MUTEX_INITIALIZER;
static struct { uint64_t stream, received, duplicated, reordered, next, last_us, silence_us; } sink;
static uint8_t sink_seen[SINK_NUMBERS / 8];

static void sink_count(const char *data, size_t len, uint64_t at_us)
{
    uint64_t words[2];
    if (len < sizeof words)
        return;
    memcpy(words, data, sizeof words);
    uint64_t number = be64toh(words[1]);
    if (be64toh(words[0]) != sink.stream || !sink.stream || number >= SINK_NUMBERS)
        return;
    if (sink_seen[number / 8] & 1 << number % 8) {
        sink.duplicated++;
        return;
    }
    sink_seen[number / 8] |= (uint8_t)(1 << number % 8);
    if (sink.received++ && at_us - sink.last_us > sink.silence_us)
        sink.silence_us = at_us - sink.last_us;
    sink.last_us = at_us;
    if (number < sink.next)
        sink.reordered++;
    else
        sink.next = number + 1;
}

static void sink_ready(int fd)
{
    static char data[BATCH][64]; /* what is longer is cut off: the numbers are in front */
    static struct iovec parts[BATCH];
    static struct mmsghdr in[BATCH];
    for (int i = 0; !in[BATCH - 1].msg_hdr.msg_iov && i < BATCH; i++) {
        parts[i] = (struct iovec){data[i], sizeof data[i]};
        in[i].msg_hdr = (struct msghdr){.msg_iov = &parts[i], .msg_iovlen = 1};
    }
    int n = recvmmsg(fd, in, BATCH, MSG_DONTWAIT, NULL);
    uint64_t at_us = now_us(CLOCK_MONOTONIC);
    if (n <= 0)
        return;
    counts.sink += (uint64_t)n;
    pthread_mutex_lock(&sink_lock);
    for (int i = 0; i < n; i++)
        sink_count(data[i], in[i].msg_len, at_us);
    pthread_mutex_unlock(&sink_lock);
}

/* `sink start STREAM` begins to count a stream, `sink` says how it is, with the first of those that are missing below the
   highest. `silence_ms`: the longest time without one of its
   datagrams, by this guest's clock, which stands while the guest does. */
static void cmd_sink(struct buf *out, int argc, char **argv)
{
    bool start = argc == 3 && !strcmp(argv[1], "start");
    uint64_t stream = start ? strtoull(argv[2], NULL, 10) : 0;
    if (argc != 1 && !stream) {
        put(out, "{\"error\": \"usage: sink [start STREAM]; a stream is a number above 0\"}");
        return;
    }
    pthread_mutex_lock(&sink_lock);
    if (start) {
        memset(sink_seen, 0, (sink.next + 7) / 8);
        memset(&sink, 0, sizeof sink);
        sink.stream = stream;
    }
    put(out, "{\"stream\": %llu, \"received\": %llu, \"duplicated\": %llu, \"reordered\": %llu, \"next\": %llu, "
        "\"silence_ms\": %.3f, \"missing\": [", (unsigned long long)sink.stream, (unsigned long long)sink.received,
        (unsigned long long)sink.duplicated, (unsigned long long)sink.reordered, (unsigned long long)sink.next,
        (double)sink.silence_us / 1e3);
    for (uint64_t number = 0, told = 0; sink.received < sink.next && number < sink.next && told < SINK_MISSING; number++)
        if (!(sink_seen[number / 8] & 1 << number % 8))
            put(out, told++ ? ", %llu" : "%llu", (unsigned long long)number);
    put(out, "]}");
    pthread_mutex_unlock(&sink_lock);
}

/* What a bulk transfer carries, over and over: BULK_BYTES, a prime, of a linear congruential sequence, twice in a row
   here. Whoever takes it compares: on a virtual wire nobody else would notice a byte that is wrong. */
static char bulk[2 * BULK_BYTES];
static struct { _Atomic uint64_t taken, given, wrong; } bulk_counts;

static void bulk_fill(void)
{
    uint32_t state = 1;
    for (size_t i = 0; i < BULK_BYTES; i++) {
        state = state * 1103515245u + 12345u;
        bulk[i] = bulk[i + BULK_BYTES] = (char)(state >> 16);
    }
}

static bool bulk_take(int fd, size_t *at) /* false: the connection has ended */
{
    static char data[BULK_BYTES];
    ssize_t n = recv(fd, data, sizeof data, MSG_DONTWAIT);
    if (n <= 0)
        return n < 0 && (errno == EAGAIN || errno == EINTR);
    bulk_counts.taken += (uint64_t)n;
    bulk_counts.wrong += memcmp(data, bulk + *at, (size_t)n) != 0;
    *at = (*at + (size_t)n) % BULK_BYTES;
    return true;
}

static bool bulk_give(int fd, size_t *at)
{
    ssize_t n = send(fd, bulk + *at, BULK_BYTES, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    bulk_counts.given += (uint64_t)n;
    *at = (*at + (size_t)n) % BULK_BYTES;
    return true;
}

static void cmd_bulk(struct buf *out, int argc, char **argv)
{
    (void)argc, (void)argv;
    put(out, "{\"taken_bytes\": %llu, \"given_bytes\": %llu, \"wrong\": %llu}", (unsigned long long)bulk_counts.taken,
        (unsigned long long)bulk_counts.given, (unsigned long long)bulk_counts.wrong);
}
