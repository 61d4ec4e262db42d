//! How fast the store is: puts of 200 KB with immediate frees, one big put, and gets. Prints one line for each.
//!
//! The raylet's part runs in this process, called when a client would send it a message, so what is measured is the
//! store and not a link.

use std::time::Instant;

use ray_ids::{ObjectId, TaskId, WorkerId};
use ray_store::{choose_path, copy_into, Lookup, StoreClient, StoreConfig, StoreError, StoreServer};

fn object(number: u32) -> ObjectId {
    ObjectId::of(TaskId::NIL, ObjectId::FIRST_PUT_INDEX + number)
}

struct Node {
    server: StoreServer,
    client: StoreClient,
    messages: u64,
}

impl Node {
    fn put(&mut self, id: ObjectId, bytes: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
        let mut writer = loop {
            match self.client.create(id, bytes.len() as u64) {
                Err(StoreError::NeedExtent { bytes }) => {
                    self.messages += 1;
                    self.client
                        .add_extent(self.server.lend_extent(self.client.slot(), bytes)?)?;
                }
                other => break other?,
            }
        };
        copy_into(writer.as_mut_slice(), bytes);
        while let Err(unsealed) = writer.seal(0) {
            self.nudge();
            writer = unsealed.writer;
        }
        Ok(())
    }

    fn free(&mut self, id: &ObjectId) {
        while self.client.request_delete(id).is_err() {
            self.nudge();
        }
    }

    fn nudge(&mut self) {
        self.messages += 1;
        self.server.drain_rings();
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let capacity_bytes = 1 << 30;
    let (path, in_memory) = choose_path(
        &format!("ray-store-put-rate-{}", std::process::id()),
        capacity_bytes,
        &std::env::temp_dir(),
    );
    let config = StoreConfig {
        path,
        capacity_bytes,
        max_clients: 16,
        max_objects: 1 << 16,
    };
    let mut server = StoreServer::create(config)?;
    let slot = server.register_client(WorkerId::from_random())?;
    let client = StoreClient::attach(server.path(), slot)?;
    let mut node = Node {
        server,
        client,
        messages: 0,
    };
    println!("store in {}", if in_memory { "/dev/shm" } else { "a file on disk" });

    let small = vec![7_u8; 200_000];
    for round in 0..3 {
        const PUTS: u32 = 40_000;
        node.messages = 0;
        let start = Instant::now();
        for number in 0..PUTS {
            node.put(object(number), &small)?;
            node.free(&object(number));
        }
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "200 KB put and free, round {round}: {:.0} puts/s, {:.2} GB/s, {} messages to the raylet",
            f64::from(PUTS) / seconds,
            f64::from(PUTS) * small.len() as f64 / seconds / 1e9,
            node.messages,
        );
    }

    let big = vec![3_u8; 400_000_000];
    for round in 0..4 {
        let start = Instant::now();
        node.put(object(round), &big)?;
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "400 MB put, round {round}: {:.2} GB/s",
            big.len() as f64 / seconds / 1e9
        );
        node.nudge();
        node.server.delete(&object(round));
    }

    node.put(object(1), &small)?;
    node.nudge();
    const GETS: u32 = 1_000_000;
    let start = Instant::now();
    for _ in 0..GETS {
        let Lookup::Found(pinned) = node.client.get(&object(1))? else {
            return Err("the object is gone".into());
        };
        std::hint::black_box(&pinned[0]);
    }
    println!(
        "get and unpin: {:.0} a second",
        f64::from(GETS) / start.elapsed().as_secs_f64()
    );
    node.server.validate()?;
    println!("{:?}", node.server.ledger());
    Ok(())
}
