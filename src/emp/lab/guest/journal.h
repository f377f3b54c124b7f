/* ---- journals: checksummed 4 KiB records appended to a volume or a file, one thread each -------------------------- */

struct record { /* little endian; crc is CRC-32 (zlib's) of the record with crc = 0; see emp.lab.journal_check */
    char magic[8];
    uint32_t version, prev_crc, crc, reserved;
    uint64_t seq, time_us;
    char boot_id[40];
    uint64_t payload[(PAGE_BYTES - 80) / 8];
};
_Static_assert(sizeof(struct record) == PAGE_BYTES, "a record fills a page");

enum { JOURNALS = 24 };
static const uint64_t FILE_RECORDS = 1 << 20; /* 4 GiB: a file grows, but not for ever */
static struct journal {
    bool used;
    _Atomic bool stop, ended;
    char serial[40], device[40], error[96];
    int fd;
    uint64_t capacity, seq, errors, period_us, begun_us, written, stall_us, stall_at_us, io_begun_us;
    int64_t acked;
    uint32_t last_crc;
    pthread_t thread;
} journals[JOURNALS];
static pthread_mutex_t journal_lock = PTHREAD_MUTEX_INITIALIZER; /* the fields above; never held across I/O */
static pthread_mutex_t journal_admin = PTHREAD_MUTEX_INITIALIZER; /* one start or stop at a time */
static uint32_t crc_table[256];

static uint32_t record_crc(const struct record *record)
{
    const unsigned char *p = (const unsigned char *)record;
    size_t hole = offsetof(struct record, crc);
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < sizeof *record; i++)
        crc = crc_table[(crc ^ (i - hole < 4 ? 0 : p[i])) & 255] ^ (crc >> 8);
    return ~crc;
}

static bool record_read(int fd, struct record *record, uint64_t seq, bool *io_error)
{
    ssize_t n = pread(fd, record, PAGE_BYTES, (off_t)(seq * PAGE_BYTES));
    *io_error = *io_error || n != PAGE_BYTES;
    return n == PAGE_BYTES && !memcmp(record->magic, "EMPJRNL", 8) && record->seq == seq && record->crc == record_crc(record);
}

static void journal_failed(struct journal *j, const char *what)
{
    pthread_mutex_lock(&journal_lock);
    j->errors++;
    snprintf(j->error, sizeof j->error, "%s: %s", what, strerror(errno));
    pthread_mutex_unlock(&journal_lock);
}

static void *journal_run(void *arg)
{
    struct journal *j = arg;
    struct record *record = aligned_alloc(PAGE_BYTES, PAGE_BYTES);
    uint64_t due = now_us(CLOCK_MONOTONIC);
    prctl(PR_SET_NAME, "journal");
    while (!j->stop && j->seq < j->capacity) {
        memset(record, 0, sizeof *record);
        memcpy(record->magic, "EMPJRNL", 8);
        memcpy(record->boot_id, boot_id, sizeof boot_id);
        record->version = 1, record->seq = j->seq, record->prev_crc = j->last_crc, record->time_us = now_us(CLOCK_REALTIME);
        for (size_t i = 0; i < sizeof record->payload / 8; i++)
            record->payload[i] = mix(j->seq * 1024 + i);
        record->crc = record_crc(record);
        pthread_mutex_lock(&journal_lock);
        uint64_t begin = j->io_begun_us = now_us(CLOCK_MONOTONIC);
        pthread_mutex_unlock(&journal_lock);
        if (pwrite(j->fd, record, PAGE_BYTES, (off_t)(j->seq * PAGE_BYTES)) != PAGE_BYTES) {
            journal_failed(j, "write"); /* the same record is tried again at the next tick */
        } else if (fdatasync(j->fd)) {
            journal_failed(j, "fdatasync");
        } else {
            pthread_mutex_lock(&journal_lock);
            j->acked = (int64_t)j->seq++;
            j->last_crc = record->crc;
            j->written++;
            pthread_mutex_unlock(&journal_lock);
        }
        uint64_t end = now_us(CLOCK_MONOTONIC);
        pthread_mutex_lock(&journal_lock);
        j->io_begun_us = 0;
        if (end - begin > j->stall_us)
            j->stall_us = end - begin, j->stall_at_us = now_us(CLOCK_REALTIME);
        pthread_mutex_unlock(&journal_lock);
        due += j->period_us;
        if (due < end) /* missed ticks are not made up for */
            due = end;
        while (!j->stop && (end = now_us(CLOCK_MONOTONIC)) < due)
            sleep_us(due - end < 50000 ? due - end : 50000);
    }
    if (j->seq >= j->capacity) {
        errno = ENOSPC;
        journal_failed(j, "end of volume");
    }
    free(record);
    j->ended = true;
    return NULL;
}

static ssize_t read_file(char *out, size_t size, const char *format, const char *entry)
{
    char path[320];
    snprintf(path, sizeof path, format, entry);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, out, size - 1);
    if (fd >= 0)
        close(fd);
    out[n > 0 ? n : 0] = 0;
    return n;
}

/* Name of the block device with this serial: virtio-blk keeps 20 bytes of it, a SCSI disk has it in its VPD page 0x80. */
static bool find_device(const char *serial, char *device, size_t size)
{
    char found[256];
    struct dirent *entry;
    DIR *blocks = opendir("/sys/block");
    bool hit = false;
    while (blocks && !hit && (entry = readdir(blocks))) {
        ssize_t n = read_file(found, sizeof found, "/sys/block/%s/serial", entry->d_name);
        hit = n > 0 && !strncmp(found, serial, 20) && (n >= 20 || (size_t)n == strlen(serial));
        if (n < 0 && (n = read_file(found, sizeof found, "/sys/block/%s/device/vpd_pg80", entry->d_name)) > 4)
            hit = (size_t)n - 4 == strlen(serial) && !memcmp(found + 4, serial, (size_t)n - 4);
        if (hit)
            snprintf(device, size, "/dev/%.30s", entry->d_name);
    }
    if (blocks)
        closedir(blocks);
    return hit;
}

/* `disks`: every SCSI disk that the guest has: its serial, address (host:channel:target:lun) and size. */
static void cmd_disks(struct buf *out, int argc, char **argv)
{
    (void)argc, (void)argv;
    const char *comma = "";
    char serial[256], size[64], path[320], where[256];
    struct dirent *entry;
    DIR *blocks = opendir("/sys/block");
    put(out, "[");
    while (blocks && (entry = readdir(blocks))) {
        ssize_t n = read_file(serial, sizeof serial, "/sys/block/%s/device/vpd_pg80", entry->d_name);
        if (n <= 4 || read_file(size, sizeof size, "/sys/block/%s/size", entry->d_name) <= 0)
            continue;
        snprintf(path, sizeof path, "/sys/block/%.200s/device", entry->d_name);
        ssize_t length = readlink(path, where, sizeof where - 1);
        where[length > 0 ? length : 0] = 0;
        const char *address = strrchr(where, '/');
        put(out, "%s{\"serial\": \"%.*s\", \"address\": \"%s\", \"bytes\": %llu}", comma, (int)(n - 4), serial + 4,
            address ? address + 1 : where, strtoull(size, NULL, 10) * 512);
        comma = ", ";
    }
    put(out, "]");
    if (blocks)
        closedir(blocks);
}

static void put_journal(struct buf *out, const struct journal *j) /* with the lock held */
{
    uint64_t now = now_us(CLOCK_MONOTONIC), in_flight = j->io_begun_us ? now - j->io_begun_us : 0;
    double seconds = (double)(now - j->begun_us) / 1e6;
    put(out, "{\"serial\": \"%s\", \"device\": \"%s\", \"running\": %s, \"seq\": %llu, \"acked_seq\": %lld, \"errors\": %llu, "
        "\"last_error\": \"%s\", \"rate_hz\": {\"target\": %.3f, \"achieved\": %.3f}, \"longest_stall_ms\": %.3f, "
        "\"longest_stall_at_s\": %.6f, \"in_flight_ms\": %.3f, \"capacity_records\": %llu}", j->serial, j->device,
        j->ended ? "false" : "true", (unsigned long long)j->seq, (long long)j->acked, (unsigned long long)j->errors, j->error,
        1e6 / (double)j->period_us, seconds > 0 ? (double)j->written / seconds : 0, (double)j->stall_us / 1e3,
        (double)j->stall_at_us / 1e6, (double)in_flight / 1e3, (unsigned long long)j->capacity);
}

static void put_journals(struct buf *out)
{
    const char *comma = "";
    put(out, "[");
    pthread_mutex_lock(&journal_lock);
    for (int i = 0; i < JOURNALS; i++) {
        if (journals[i].used)
            put(out, "%s", comma), put_journal(out, &journals[i]), comma = ", ";
    }
    pthread_mutex_unlock(&journal_lock);
    put(out, "]");
}

static void journal_stop(struct journal *j)
{
    j->stop = true;
    pthread_join(j->thread, NULL);
    close(j->fd);
}

/* Waits up to 5 s for a disk on its way (boot, hot-plug); its node shows a moment before it opens (ENXIO till then). */
static int disk_open(const char *serial, char *device, size_t size)
{
    uint64_t deadline = now_us(CLOCK_MONOTONIC) + 5000000;
    for (;;) {
        int fd = -1;
        bool found = find_device(serial, device, size);
        if (found)
            fd = open(device, O_RDWR | O_DIRECT | O_CLOEXEC);
        if (fd >= 0 || (found && errno != ENXIO) || now_us(CLOCK_MONOTONIC) > deadline)
            return fd;
        sleep_us(20000);
    }
}

static void journal_start(struct buf *out, const char *serial, double rate_hz)
{
    struct journal *j = NULL;
    for (int i = JOURNALS - 1; i >= 0; i--) {
        if (journals[i].used && !strcmp(journals[i].serial, serial) && !journals[i].ended) {
            put(out, "{\"error\": \"a journal already runs on %s\"}", serial);
            return;
        }
        if (!journals[i].used || !strcmp(journals[i].serial, serial))
            j = &journals[i];
    }
    if (!j) {
        put(out, "{\"error\": \"%d journals at most\"}", JOURNALS);
        return;
    }
    char device[40] = "";
    bool is_file = serial[0] == '/';
    if (is_file)
        snprintf(device, sizeof device, "%s", serial);
    int fd = is_file ? open(device, O_RDWR | O_DIRECT | O_CLOEXEC | O_CREAT, 0644) : disk_open(serial, device, sizeof device);
    if (!device[0]) {
        put(out, "{\"error\": \"no disk with the serial %s\"}", serial);
        return;
    }
    uint64_t bytes = 0, low = 0;
    struct stat file;
    if (fd < 0 || (is_file ? fstat(fd, &file) : ioctl(fd, BLKGETSIZE64, &bytes))) {
        put(out, "{\"error\": \"%s: %s\"}", device, strerror(errno));
        if (fd >= 0)
            close(fd);
        return;
    }
    if (is_file)
        bytes = (uint64_t)file.st_size;
    /* Find the end of an existing chain: records [0, low) are valid. A volume of foreign content is left alone. */
    struct record *record = aligned_alloc(PAGE_BYTES, PAGE_BYTES);
    bool io_error = false, foreign = false;
    uint64_t capacity = bytes / PAGE_BYTES, high = capacity;
    uint32_t crc = 0;
    for (uint64_t step = 1; low < high; step *= 2) { /* gallop */
        uint64_t at = low + step - 1 < high ? low + step - 1 : high - 1;
        if (!record_read(fd, record, at, &io_error)) {
            for (size_t i = 0; at == 0 && i < PAGE_BYTES; i++)
                foreign |= ((char *)record)[i] != 0;
            high = at;
            break;
        }
        low = at + 1;
    }
    while (low < high) { /* bisect */
        uint64_t middle = low + (high - low) / 2;
        if (record_read(fd, record, middle, &io_error))
            low = middle + 1;
        else
            high = middle;
    }
    if (low && record_read(fd, record, low - 1, &io_error))
        crc = record->crc;
    free(record);
    if (io_error || foreign) {
        put(out, "{\"error\": \"%s: %s\"}", device, io_error ? "cannot be read" : "holds other data than a journal");
        close(fd);
        return;
    }
    pthread_mutex_lock(&journal_lock);
    if (j->used && j->ended && !j->stop)
        pthread_join(j->thread, NULL), close(j->fd);
    memset(j, 0, sizeof *j);
    snprintf(j->serial, sizeof j->serial, "%s", serial);
    snprintf(j->device, sizeof j->device, "%s", device);
    j->fd = fd, j->capacity = is_file ? FILE_RECORDS : capacity, j->seq = low, j->acked = (int64_t)low - 1, j->last_crc = crc;
    j->period_us = (uint64_t)(1e6 / rate_hz), j->begun_us = now_us(CLOCK_MONOTONIC);
    j->used = !pthread_create(&j->thread, NULL, journal_run, j);
    if (j->used)
        put_journal(out, j);
    else
        put(out, "{\"error\": \"no thread\"}");
    pthread_mutex_unlock(&journal_lock);
}

/* `journal start SERIAL RATE_HZ` continues the chain on that volume, or in a file where SERIAL is a path; `journal stop [SERIAL]`; `journal mark [SERIAL]` forgets
 * the longest stall; `journal status`. All but start answer with the list of journals. */
static void cmd_journal(struct buf *out, int argc, char **argv)
{
    const char *verb = argc > 1 ? argv[1] : "", *serial = argc > 2 ? argv[2] : NULL;
    bool stop = !strcmp(verb, "stop"), mark = !strcmp(verb, "mark");
    double rate_hz = argc == 4 ? atof(argv[3]) : 0;
    if (!strcmp(verb, "start") && argc == 4 && strlen(serial) < sizeof journals->serial && rate_hz >= 0.01 && rate_hz <= 10000) {
        pthread_mutex_lock(&journal_admin);
        journal_start(out, serial, rate_hz);
        pthread_mutex_unlock(&journal_admin);
        return;
    }
    if (!stop && !mark && strcmp(verb, "status")) {
        put(out, "{\"error\": \"usage: journal start SERIAL RATE_HZ (0.01 to 10000) | stop [SERIAL] | mark [SERIAL] | status\"}");
        return;
    }
    for (struct journal *j = journals; j < journals + JOURNALS; j++) {
        if (!j->used || (serial && strcmp(serial, j->serial)))
            continue;
        if (mark) {
            pthread_mutex_lock(&journal_lock);
            j->stall_us = j->stall_at_us = 0;
            pthread_mutex_unlock(&journal_lock);
        } else if (stop) {
            pthread_mutex_lock(&journal_admin);
            if (!j->stop)
                journal_stop(j);
            pthread_mutex_unlock(&journal_admin);
        }
    }
    put_journals(out);
}
