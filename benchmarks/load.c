/* The load generator of the benchmarks. Its clients share one thread and check every byte of the echo.
 *
 * load MODE --port PORT [--clients N] [--size BYTES] [--seconds S] [--warmup S] [--rate R] [--pid PID] [--tls CA]
 *
 *   pingpong  each client sends a message of SIZE bytes once the previous one has been echoed
 *   stream    each client writes SIZE bytes at a time whenever it can, and reads the echo
 *   connect   each client connects, sends SIZE bytes, closes after the echo, and starts again
 *   rate      R messages per second over all clients, sent when they are due, whether or not earlier ones have been
 *             echoed. A latency counts from the time at which the message was due. So a stall of the server shows in
 *             the latencies of all messages that were due meanwhile.
 *   idle      each client has one message echoed, and then stays silent
 *   hold      like idle, but prints "ready", and then waits until the server has closed all clients
 *
 * The result is one line of JSON on standard output. CPU time and memory are sums over the process PID and all its
 * descendants.
 *
 * The data is one random pattern, repeated. Its length is prime, so a lost, repeated or moved byte causes a mismatch.
 * The buffer repeats the beginning of the pattern after its end. So any piece of the stream is contiguous in memory.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <openssl/err.h>
#include <openssl/ssl.h>

enum { PERIOD = 65521, CHUNK = 256 * 1024, EVENTS = 512, SOURCES = 200, GIVE_UP = 20 };
static const uint64_t SECOND = 1000000000;

enum mode { PINGPONG, STREAM, CONNECT, RATE, IDLE, HOLD, MODES };
static const char *const mode_names[MODES] = {"pingpong", "stream", "connect", "rate", "idle", "hold"};

struct client {
    int fd;
    SSL *ssl;
    uint64_t wanted, sent, received; /* bytes of its stream: due, sent, echoed */
    uint64_t *due;                   /* rate: the due time of each outstanding message, a ring */
    uint64_t first_due, last_due;
    bool polls_out;
};

static struct {
    enum mode mode;
    int port, clients;
    size_t size;
    double seconds, warmup, rate;
    int pid;
    const char *ca;
} options = {.mode = MODES, .clients = 1, .size = 512, .seconds = 1, .warmup = 0.3};

static char pattern[PERIOD + CHUNK], input[CHUNK];
static struct client *clients;
static int poller;
static SSL_CTX *tls;
static uint64_t ring;              /* the length of each ring `due`, a power of two */
static uint64_t window_start;      /* 0 during connecting and warm-up */
static uint64_t units, bytes, errors;
static int open_clients;
static char first_error[256];

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static void die(const char *what)
{
    printf("{\"error\": \"%s: %s\"}\n", what, strerror(errno));
    exit(1);
}

static void wrong(struct client *c, const char *format, ...)
{
    if (!errors++) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(first_error, sizeof first_error, format, arguments);
        va_end(arguments);
    }
    if (c->ssl)
        SSL_free(c->ssl);
    c->ssl = NULL;
    close(c->fd);
    c->fd = -1;
    open_clients--;
}

/* Latencies. With 128 buckets per power of two, a figure is accurate to 1%. */

enum { STEPS = 128, BUCKETS = 58 * STEPS };
static uint64_t histogram[BUCKETS], measured, largest;

static void record(uint64_t ns)
{
    int shift = 0;
    while (ns >> shift >= 2 * STEPS)
        shift++;
    histogram[shift * STEPS + (ns >> shift)]++;
    measured++;
    if (ns > largest)
        largest = ns;
}

static double percentile(double share)
{
    uint64_t left = (uint64_t)(share * (double)measured);
    for (int i = 0; i < BUCKETS; i++) {
        if (histogram[i] > left) {
            int shift = i < 2 * STEPS ? 0 : i / STEPS - 1;
            return (double)((uint64_t)(i - shift * STEPS) << shift) / 1e9;
        }
        left -= histogram[i];
    }
    return (double)largest / 1e9;
}

/* The resource usage of a process and its descendants. */

struct usage {
    double cpu;
    uint64_t memory; /* bytes, anonymous, proportional (Pss_Anon) */
};

static struct usage usage(int pid, bool memory)
{
    struct usage sum = {0};
    struct timespec t;
    /* The CPU clock of a process, as in clock_getcpuclockid(3). It includes threads that have ended. */
    if (clock_gettime((clockid_t)(~(unsigned)pid << 3 | 2), &t) == 0)
        sum.cpu = (double)t.tv_sec + (double)t.tv_nsec / 1e9;
    char path[300], line[4096];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return sum;
    if (fgets(line, sizeof line, file)) {
        long user = 0, kernel = 0; /* of reaped children, in ticks */
        char *fields = strrchr(line, ')');
        if (fields && sscanf(fields + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %ld %ld", &user, &kernel) == 2)
            sum.cpu += (double)(user + kernel) / (double)sysconf(_SC_CLK_TCK);
    }
    fclose(file);
    if (memory) {
        snprintf(path, sizeof path, "/proc/%d/smaps_rollup", pid);
        if ((file = fopen(path, "r"))) {
            unsigned long kib;
            while (fgets(line, sizeof line, file))
                if (sscanf(line, "Pss_Anon: %lu", &kib) == 1)
                    sum.memory += kib * 1024;
            fclose(file);
        }
    }
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *threads = opendir(path);
    struct dirent *thread;
    while (threads && (thread = readdir(threads))) {
        if (thread->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/proc/%d/task/%s/children", pid, thread->d_name);
        if (!(file = fopen(path, "r")))
            continue;
        int child;
        while (fscanf(file, "%d", &child) == 1) {
            struct usage below = usage(child, memory);
            sum.cpu += below.cpu;
            sum.memory += below.memory;
        }
        fclose(file);
    }
    if (threads)
        closedir(threads);
    return sum;
}

static struct usage server(bool memory)
{
    return options.pid ? usage(options.pid, memory) : (struct usage){0};
}

static double own_cpu(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* One connection. */

static void poll_for(struct client *c, bool out, int operation)
{
    struct epoll_event event = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    if (operation == EPOLL_CTL_MOD && c->polls_out == out)
        return;
    c->polls_out = out;
    epoll_ctl(poller, operation, c->fd, &event);
}

/* Like send(2) and recv(2), in clear or over TLS. */

static ssize_t tls_result(struct client *c, int result)
{
    if (result > 0)
        return result;
    switch (SSL_get_error(c->ssl, result)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE:
        errno = EAGAIN;
        return -1;
    case SSL_ERROR_ZERO_RETURN:
        return 0;
    default:
        ERR_clear_error();
        errno = errno ? errno : EPROTO;
        return -1;
    }
}

static ssize_t give(struct client *c, const char *from, size_t count)
{
    return c->ssl ? tls_result(c, SSL_write(c->ssl, from, (int)count)) : send(c->fd, from, count, MSG_NOSIGNAL);
}

static ssize_t take(struct client *c)
{
    return c->ssl ? tls_result(c, SSL_read(c->ssl, input, CHUNK)) : recv(c->fd, input, CHUNK, 0);
}

static bool pump(struct client *c)
{
    while (c->sent < c->wanted) {
        size_t part = options.size - c->sent % options.size;
        if (part > c->wanted - c->sent)
            part = c->wanted - c->sent;
        ssize_t count = give(c, pattern + c->sent % PERIOD, part);
        if (count < 0) {
            if (errno != EAGAIN) {
                wrong(c, "send: %s", strerror(errno));
                return false;
            }
            break;
        }
        c->sent += (uint64_t)count;
    }
    /* During a handshake, OpenSSL may have to read before it can write. */
    poll_for(c, c->sent < c->wanted && !(c->ssl && SSL_want_read(c->ssl)), EPOLL_CTL_MOD);
    return true;
}

static bool dial(struct client *c, bool wait)
{
    static uint32_t source;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)}, from = {.sin_family = AF_INET};
    int on = 1;
    if ((c->fd = socket(AF_INET, SOCK_STREAM | (wait ? 0 : SOCK_NONBLOCK) | SOCK_CLOEXEC, 0)) < 0)
        die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    /* One source address has only about 28,000 ephemeral ports. */
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    from.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + source++ % SOURCES);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(c->fd, (struct sockaddr *)&from, sizeof from) < 0)
        die("bind");
    open_clients++;
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS) {
        wrong(c, "connect: %s", strerror(errno));
        return false;
    }
    if (tls) {
        c->ssl = SSL_new(tls);
        SSL_set_fd(c->ssl, c->fd);
        SSL_set1_host(c->ssl, "localhost");
        SSL_set_connect_state(c->ssl);
        if (wait && SSL_do_handshake(c->ssl) != 1) {
            wrong(c, "TLS handshake: %s", ERR_reason_error_string(ERR_get_error()));
            return false;
        }
    }
    if (wait)
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->wanted = c->sent = c->received = 0;
    poll_for(c, false, EPOLL_CTL_ADD);
    return true;
}

static void begin(struct client *c)
{
    c->wanted += options.size;
    pump(c);
}

static void message_back(struct client *c)
{
    bool counts = window_start != 0;
    if (counts && options.mode != IDLE && options.mode != HOLD)
        units++;
    switch (options.mode) {
    case PINGPONG:
        begin(c);
        break;
    case CONNECT:
        if (c->ssl) {
            SSL_shutdown(c->ssl);
            SSL_free(c->ssl);
            c->ssl = NULL;
        }
        close(c->fd);
        open_clients--;
        if (dial(c, false))
            begin(c);
        break;
    case RATE: {
        uint64_t time = now();
        uint64_t due = c->due[c->first_due++ & (ring - 1)];
        if (counts && due >= window_start)
            record(time > due ? time - due : 0);
        break;
    }
    default:
        units++;
    }
}

static void receive(struct client *c)
{
    /* OpenSSL may hold a record that it has already read from the socket, so epoll would not report it. */
    do {
        ssize_t count = take(c);
        if (count < 0 && errno == EAGAIN)
            return;
        if (count <= 0) {
            if (options.mode == HOLD && count == 0) {
                close(c->fd);
                c->fd = -1;
                open_clients--;
            } else {
                wrong(c, "recv: %s", count ? strerror(errno) : "the server closed");
            }
            return;
        }
        if (c->received + (uint64_t)count > c->sent || memcmp(input, pattern + c->received % PERIOD, (size_t)count)) {
            wrong(c, "the echo differs within bytes %llu to %llu", (unsigned long long)c->received,
                  (unsigned long long)c->received + (unsigned long long)count);
            return;
        }
        uint64_t before = c->received / options.size;
        c->received += (uint64_t)count;
        if (window_start)
            bytes += (uint64_t)count;
        uint64_t whole = c->received / options.size - before;
        if (options.mode == STREAM) {
            units += window_start ? whole : 0;
        } else if (whole) {
            while (whole--)
                message_back(c);
            if (options.mode == CONNECT)
                return; /* the client has a new connection */
        }
    } while (c->ssl && c->fd >= 0 && SSL_pending(c->ssl));
}

static void turn(int timeout)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(poller, events, EVENTS, timeout);
    for (int i = 0; i < count; i++) {
        struct client *c = events[i].data.ptr;
        if (events[i].events & ~(uint32_t)EPOLLOUT) {
            receive(c);
            if (c->fd >= 0 && c->ssl && c->sent < c->wanted)
                pump(c); /* the handshake may be done */
        }
        if (c->fd >= 0 && events[i].events & EPOLLOUT) {
            if (options.mode == STREAM)
                c->wanted = c->sent - c->sent % options.size + 4 * options.size;
            pump(c);
            if (options.mode == STREAM && c->fd >= 0)
                poll_for(c, true, EPOLL_CTL_MOD);
        }
    }
}

/* Return the next gap of a Poisson process: exponentially distributed, and the same sequence in every run. */

static double gap(void)
{
    static uint64_t state = 0x9E3779B97F4A7C15;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    double share = (double)(state >> 11) / 9007199254740992.0, log = 0, x;
    /* -ln(1 - share) without libm: scale by powers of two until a short series converges */
    for (x = 1 - share; x < 0.5; x *= 2)
        log += 0.6931471805599453;
    double y = (1 - x) / (1 + x), power = y;
    for (int i = 1; i < 40; i += 2, power *= y * y)
        log += 2 * power / i;
    return log;
}

static void run_until(uint64_t end)
{
    if (options.mode != RATE) {
        uint64_t time;
        while ((time = now()) < end && open_clients)
            turn((int)((end - time) / 1000000) + 1);
        return;
    }
    static uint64_t next;
    static int target;
    if (!next)
        next = now();
    for (uint64_t time; (time = now()) < end && open_clients;) {
        while (next <= time) {
            struct client *c = &clients[target];
            target = (target + 1) % options.clients;
            if (c->fd >= 0) {
                if (c->last_due - c->first_due == ring) {
                    wrong(c, "the server does not keep up: one client has %llu outstanding messages", (unsigned long long)ring);
                } else {
                    c->due[c->last_due++ & (ring - 1)] = next;
                    c->wanted += options.size;
                    pump(c);
                }
            }
            next += (uint64_t)(gap() / options.rate * (double)SECOND);
        }
        turn(0); /* busy polling: a wake-up takes longer than an echo */
    }
}

static void parse(int argc, char **argv)
{
    static const struct option names[] = {
        {"port", 1, 0, 'p'}, {"clients", 1, 0, 'c'}, {"size", 1, 0, 's'}, {"seconds", 1, 0, 't'},
        {"warmup", 1, 0, 'w'}, {"rate", 1, 0, 'r'}, {"pid", 1, 0, 'i'}, {"tls", 1, 0, 'a'}, {0}};
    for (int option; (option = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (option) {
        case 'p': options.port = atoi(optarg); break;
        case 'c': options.clients = atoi(optarg); break;
        case 's': options.size = strtoul(optarg, NULL, 10); break;
        case 't': options.seconds = atof(optarg); break;
        case 'w': options.warmup = atof(optarg); break;
        case 'r': options.rate = atof(optarg); break;
        case 'i': options.pid = atoi(optarg); break;
        case 'a': options.ca = optarg; break;
        default: exit(2);
        }
    }
    for (int i = 0; optind < argc && i < MODES; i++)
        if (!strcmp(argv[optind], mode_names[i]))
            options.mode = (enum mode)i;
    if (options.mode == MODES || options.port <= 0 || options.clients <= 0 || options.size == 0 || options.size > CHUNK ||
        (options.mode == RATE) != (options.rate > 0)) {
        fprintf(stderr, "usage: load pingpong|stream|connect|rate|idle|hold --port PORT ...; see the comment at the top of load.c\n");
        exit(2);
    }
}

static void prepare(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    alarm((unsigned)(options.seconds + options.warmup) + 3 * GIVE_UP);

    uint32_t state = 2463534242;
    for (size_t i = 0; i < PERIOD; i++) {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        pattern[i] = (char)state;
    }
    for (size_t i = 0; i < CHUNK; i++)
        pattern[PERIOD + i] = pattern[i % PERIOD];

    if (options.ca) {
        tls = SSL_CTX_new(TLS_client_method());
        SSL_CTX_set_min_proto_version(tls, TLS1_3_VERSION);
        SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        SSL_CTX_set_verify(tls, SSL_VERIFY_PEER, NULL);
        if (SSL_CTX_load_verify_locations(tls, options.ca, NULL) != 1)
            die("the CA's certificate");
    }
    for (ring = 64; (double)ring < 2 * options.rate / options.clients;)
        ring *= 2;
    clients = calloc((size_t)options.clients, sizeof *clients);
    poller = epoll_create1(EPOLL_CLOEXEC);
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    prepare();
    struct usage before = server(true);
    uint64_t start = now();
    for (int i = 0; i < options.clients; i++) {
        struct client *c = &clients[i];
        if (options.mode == RATE)
            c->due = malloc(ring * sizeof *c->due);
        if (!dial(c, options.mode != CONNECT))
            continue;
        if (options.mode == STREAM)
            poll_for(c, true, EPOLL_CTL_MOD);
        else if (options.mode != RATE)
            begin(c);
        /* Idle clients connect one after the other, so that a short backlog is enough. */
        if (options.mode == IDLE || options.mode == HOLD)
            while (units + errors <= (uint64_t)i && now() - start < GIVE_UP * SECOND)
                turn(1000);
    }
    if (options.mode == HOLD) {
        puts("ready");
        fflush(stdout);
        while (open_clients)
            turn(-1);
        return 0;
    }
    run_until(now() + (uint64_t)(options.warmup * (double)SECOND));

    struct usage begun = server(false);
    double load = own_cpu();
    window_start = now();
    run_until(window_start + (uint64_t)(options.seconds * (double)SECOND));
    struct usage ended = server(options.mode == IDLE);
    double seconds = (double)(now() - window_start) / 1e9;
    uint64_t units_then = units, bytes_then = bytes;
    load = own_cpu() - load;
    /* The latencies of outstanding messages count as well. */
    if (options.mode == RATE)
        for (uint64_t deadline = now() + 2 * SECOND; now() < deadline;) {
            bool all = true;
            for (int i = 0; i < options.clients && all; i++)
                all = clients[i].fd < 0 || clients[i].first_due == clients[i].last_due;
            if (all)
                break;
            turn(1);
        }
    printf("{\"clients\": %d, \"size\": %zu, \"units\": %llu, \"bytes\": %llu, \"seconds\": %.9f, "
           "\"cpu\": %.9f, \"load_cpu\": %.9f, \"errors\": %llu, \"first_error\": \"%s\"",
           options.clients, options.size, (unsigned long long)units_then,
           (unsigned long long)bytes_then, seconds, ended.cpu - begun.cpu, load, (unsigned long long)errors,
           first_error);
    if (options.mode == IDLE)
        printf(", \"memory_before\": %llu, \"memory_after\": %llu", (unsigned long long)before.memory,
               (unsigned long long)ended.memory);
    if (measured)
        printf(", \"latency\": {\"p50\": %.9f, \"p99\": %.9f, \"p999\": %.9f, \"max\": %.9f}", percentile(0.5),
               percentile(0.99), percentile(0.999), (double)largest / 1e9);
    puts("}");
    return 0;
}
