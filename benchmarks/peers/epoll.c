/* An echo server on epoll: one epoll_wait, then one recv and one send for each ready client.
 *
 * All clients share one buffer. A client that fills the buffer is served again at once, which is cheaper than another
 * epoll_wait. Only data that send(2) does not take is copied. The server then waits for EPOLLOUT instead of EPOLLIN,
 * so nothing is left to send at EOF.
 *
 * Usage: epoll PORT */

#define _GNU_SOURCE /* accept4 */

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "listener.h"

enum { EVENTS = 512, SIZE = 262144, TURNS = 32 };

struct rest {
    char *data; /* unsent bytes, or NULL */
    size_t begin, end;
};

static int poller, listener;
static struct rest rests[FILES]; /* indexed by descriptor */
static char buffer[SIZE];

static void watch(int operation, int fd, unsigned events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    if (epoll_ctl(poller, operation, fd, &event) < 0)
        die("epoll_ctl");
}

static void end(int fd)
{
    free(rests[fd].data);
    rests[fd].data = NULL;
    close(fd);
}

static void accept_all(void)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0)
        watch(EPOLL_CTL_ADD, fd, EPOLLIN);
}

static void keep(int fd, size_t begin, size_t end)
{
    struct rest *rest = &rests[fd];
    rest->begin = 0;
    rest->end = end - begin;
    rest->data = malloc(rest->end);
    if (rest->data == NULL)
        die("malloc");
    memcpy(rest->data, buffer + begin, rest->end);
    watch(EPOLL_CTL_MOD, fd, EPOLLOUT);
}

/* Echo once; return whether the client may have more data. */
static bool echo(int fd)
{
    ssize_t got = recv(fd, buffer, SIZE, 0);
    if (got <= 0) {
        if (got == 0 || errno != EAGAIN)
            end(fd);
        return false;
    }
    ssize_t sent = send(fd, buffer, got, MSG_NOSIGNAL);
    if (sent == got)
        return got == SIZE;
    if (sent < 0 && errno != EAGAIN) {
        end(fd);
        return false;
    }
    keep(fd, sent < 0 ? 0 : sent, got);
    return false;
}

static void send_rest(int fd)
{
    struct rest *rest = &rests[fd];
    ssize_t sent = send(fd, rest->data + rest->begin, rest->end - rest->begin, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN)
            end(fd);
        return;
    }
    rest->begin += sent;
    if (rest->begin < rest->end)
        return;
    free(rest->data);
    rest->data = NULL;
    watch(EPOLL_CTL_MOD, fd, EPOLLIN);
}

int main(int count, char **arguments)
{
    if (count != 2)
        return 2;
    raise_limit();
    listener = listen_at(atoi(arguments[1]), SOCK_NONBLOCK);
    poller = epoll_create1(0);
    watch(EPOLL_CTL_ADD, listener, EPOLLIN);
    for (;;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(poller, events, EVENTS, -1);
        if (ready < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener)
                accept_all();
            else if (rests[fd].data != NULL)
                send_rest(fd);
            else
                for (int turn = 0; turn < TURNS && echo(fd); turn++)
                    ;
        }
    }
}
