/* An echo server on io_uring: multishot accept, multishot recv into provided buffers, and one send at a time per client.
 *
 * A send uses the provided buffer directly and does not block. After a short send, the rest is copied, so a client that
 * does not read occupies none of the buffers. Its recv is then cancelled until everything is sent.
 *
 * Usage: uring [PORT]
 *
 * Without a port, it only checks whether the kernel supports these operations. */

#include <errno.h>
#include <liburing.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "listener.h"

enum { ENTRIES = 4096, COMPLETIONS = 16384, BUFFERS = 64, SIZE = 262144, GROUP = 0 };
enum operation { ACCEPT, RECV, SEND, NOTHING };

struct piece {
    struct piece *next;
    char *data;
    size_t begin, end;
    char copy[]; /* the memory of data, unless that is one of the buffers */
};

struct client {
    struct piece *first, *last; /* unsent pieces; the first is being sent */
    bool slow, receiving, ended;
};

static struct io_uring ring;
static struct io_uring_buf_ring *provided;
static char buffers[BUFFERS][SIZE];
static struct piece pieces[BUFFERS];
static struct client clients[FILES]; /* indexed by descriptor */
static int listener;

static __u64 tag(enum operation operation, int fd)
{
    return (__u64)operation << 32 | (unsigned)fd;
}

static struct io_uring_sqe *entry(void)
{
    struct io_uring_sqe *sqe;
    while ((sqe = io_uring_get_sqe(&ring)) == NULL)
        io_uring_submit(&ring);
    return sqe;
}

static void provide(int number)
{
    io_uring_buf_ring_add(provided, buffers[number], SIZE, number, io_uring_buf_ring_mask(BUFFERS), 0);
    io_uring_buf_ring_advance(provided, 1);
}

static void release(struct piece *piece)
{
    if (piece >= pieces && piece < pieces + BUFFERS)
        provide(piece - pieces);
    else
        free(piece);
}

static struct piece *copied(struct piece *piece)
{
    size_t size = piece->end - piece->begin;
    struct piece *copy = malloc(sizeof *copy + size);
    if (copy == NULL)
        die("malloc");
    memcpy(copy->copy, piece->data + piece->begin, size);
    *copy = (struct piece){.next = piece->next, .data = copy->copy, .end = size};
    release(piece);
    return copy;
}

static void submit_accept(void)
{
    struct io_uring_sqe *sqe = entry();
    io_uring_prep_multishot_accept(sqe, listener, NULL, NULL, 0);
    io_uring_sqe_set_data64(sqe, tag(ACCEPT, listener));
}

static void submit_recv(int fd)
{
    struct io_uring_sqe *sqe = entry();
    io_uring_prep_recv_multishot(sqe, fd, NULL, 0, 0);
    sqe->flags |= IOSQE_BUFFER_SELECT;
    sqe->buf_group = GROUP;
    io_uring_sqe_set_data64(sqe, tag(RECV, fd));
    clients[fd].receiving = true;
}

static void submit_cancel(int fd)
{
    struct io_uring_sqe *sqe = entry();
    io_uring_prep_cancel64(sqe, tag(RECV, fd), 0);
    io_uring_sqe_set_data64(sqe, tag(NOTHING, fd));
}

static void submit_send(int fd)
{
    struct piece *piece = clients[fd].first;
    struct io_uring_sqe *sqe = entry();
    int flags = MSG_NOSIGNAL | (clients[fd].slow ? MSG_WAITALL : MSG_DONTWAIT);
    io_uring_prep_send(sqe, fd, piece->data + piece->begin, piece->end - piece->begin, flags);
    io_uring_sqe_set_data64(sqe, tag(SEND, fd));
}

static void submit_close(int fd)
{
    struct io_uring_sqe *sqe = entry();
    io_uring_prep_close(sqe, fd);
    io_uring_sqe_set_data64(sqe, tag(NOTHING, fd));
    clients[fd] = (struct client){0};
}

/* Continue after the last send: receive again, or close. */
static void idle(int fd)
{
    struct client *client = &clients[fd];
    client->slow = false;
    if (client->receiving)
        return;
    if (client->ended)
        submit_close(fd);
    else
        submit_recv(fd);
}

static void received(int fd, int result, unsigned flags)
{
    struct client *client = &clients[fd];
    if (!(flags & IORING_CQE_F_MORE))
        client->receiving = false;
    if (result > 0) {
        struct piece *piece = &pieces[flags >> IORING_CQE_BUFFER_SHIFT];
        *piece = (struct piece){.data = buffers[piece - pieces], .end = result};
        if (client->ended) {
            release(piece);
        } else {
            bool sending = client->first != NULL;
            if (client->slow)
                piece = copied(piece);
            if (sending)
                client->last->next = piece;
            else
                client->first = piece;
            client->last = piece;
            if (!sending)
                submit_send(fd);
        }
    } else if (result != -ENOBUFS && result != -ECANCELED) {
        client->ended = true;
    }
    if (client->first == NULL)
        idle(fd);
}

static void sent(int fd, int result)
{
    struct client *client = &clients[fd];
    struct piece *piece = client->first;
    if (result < 0 && result != -EAGAIN) {
        client->ended = true;
        while ((piece = client->first) != NULL) {
            client->first = piece->next;
            release(piece);
        }
        shutdown(fd, SHUT_RDWR); /* ends the recv */
        idle(fd);
        return;
    }
    piece->begin += result > 0 ? result : 0;
    if (piece->begin == piece->end) {
        client->first = piece->next;
        release(piece);
    } else if (!client->slow) {
        client->slow = true;
        for (struct piece **link = &client->first; *link != NULL; link = &(*link)->next)
            client->last = *link = copied(*link);
        if (client->receiving)
            submit_cancel(fd);
    }
    if (client->first != NULL)
        submit_send(fd);
    else
        idle(fd);
}

static void set_up(void)
{
    struct io_uring_params params = {
        .flags = IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        .cq_entries = COMPLETIONS,
    };
    struct io_uring_buf_reg registration = {.ring_entries = BUFFERS, .bgid = GROUP};
    errno = -io_uring_queue_init_params(ENTRIES, &ring, &params);
    if (errno != 0)
        die("io_uring_setup");
    long page = sysconf(_SC_PAGESIZE); /* larger than the ring */
    provided = aligned_alloc(page, page);
    if (provided == NULL)
        die("aligned_alloc");
    registration.ring_addr = (unsigned long)provided;
    errno = -io_uring_register_buf_ring(&ring, &registration, 0);
    if (errno != 0)
        die("io_uring_register_buf_ring");
    io_uring_buf_ring_init(provided);
    for (int i = 0; i < BUFFERS; i++)
        provide(i);
}

int main(int count, char **arguments)
{
    raise_limit();
    set_up();
    if (count != 2)
        return 0;
    listener = listen_at(atoi(arguments[1]), 0);
    submit_accept();
    for (;;) {
        struct io_uring_cqe *cqe;
        unsigned head, done = 0;
        io_uring_submit_and_wait(&ring, 1);
        io_uring_for_each_cqe(&ring, head, cqe)
        {
            int fd = (int)cqe->user_data;
            switch ((enum operation)(cqe->user_data >> 32)) {
            case ACCEPT:
                if (cqe->res >= 0)
                    submit_recv(cqe->res);
                if (!(cqe->flags & IORING_CQE_F_MORE))
                    submit_accept();
                break;
            case RECV:
                received(fd, cqe->res, cqe->flags);
                break;
            case SEND:
                sent(fd, cqe->res);
                break;
            case NOTHING:
                break;
            }
            done++;
        }
        io_uring_cq_advance(&ring, done);
    }
}
