//! News on its way: what is passed on next, and how often it has been.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::NodeId;

/// Members whose latest news is still passed on; one entry for each.
#[derive(Debug, Default)]
pub(super) struct Rumours {
    sent: BTreeMap<NodeId, u32>,
    order: BTreeSet<(u32, NodeId)>,
}

impl Rumours {
    /// There is news about a member; what was passed on of it before is stale.
    pub(super) fn tell(&mut self, node: NodeId) {
        self.forget(&node);
        self.sent.insert(node, 0);
        self.order.insert((0, node));
    }

    /// The `count` that were passed on least; each is forgotten when it has been taken `limit` times.
    pub(super) fn take(&mut self, count: usize, limit: u32) -> Vec<NodeId> {
        let next: Vec<(u32, NodeId)> = self.order.iter().take(count).copied().collect();
        for (sent, node) in &next {
            self.forget(node);
            if sent + 1 < limit {
                self.sent.insert(*node, sent + 1);
                self.order.insert((sent + 1, *node));
            }
        }
        next.into_iter().map(|(_, node)| node).collect()
    }

    /// Whether there is no news.
    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// A member is not talked of any more.
    pub(super) fn forget(&mut self, node: &NodeId) {
        if let Some(sent) = self.sent.remove(node) {
            self.order.remove(&(sent, *node));
        }
    }
}
