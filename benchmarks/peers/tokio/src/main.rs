//! An echo server on tokio, with one task per client and a single thread.
//!
//! Usage: echo PORT

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const BACKLOG: u32 = 4096;
const SIZE: usize = 65536;

fn raise_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
    }
}

async fn echo(mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(SIZE);
    while client.read_buf(&mut buffer).await? > 0 {
        client.write_all(&buffer).await?;
        buffer.clear();
    }
    Ok(())
}

async fn serve(port: u16) -> io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(([127, 0, 0, 1], port).into())?;
    let listener = socket.listen(BACKLOG)?;
    loop {
        let (client, _) = listener.accept().await?;
        tokio::spawn(echo(client));
    }
}

fn main() -> io::Result<()> {
    raise_limit();
    let port = std::env::args().nth(1).and_then(|text| text.parse().ok()).expect("a port");
    tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(serve(port))
}
