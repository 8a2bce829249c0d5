//! What is not what it should be any more, found and made whole.
//!
//! Damage is found by reading: all of one image ([`Store::verify`]), or every list ([`Store::unlisted`]). It is written anew out of
//! what else here has the same bytes, and what nothing has is *in doubt*: the index forgets it, and whoever completes that image next
//! brings it. While an image is in doubt nothing is removed, since nobody knows what it needs.
//!
//! **Races.** What is written and forgotten is so while nobody takes up chunks or commits. An import that began before, and counted on
//! what is forgotten, finds so when it commits, and fails ([`super::write`]).
//!
//! **If it dies** between writing and forgetting, the next look finds what is left. **If the disk does not take** what was
//! written, that is in doubt too: the page cache says that it is right.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

use super::collect::Reached;
use super::index::{Doubt, Location};
use super::{Store, StoreError, hex, lock};
use crate::image::{Chunk, Content, ContentId};

/// What of an image or an original is not what it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// What, for people.
    pub told: Vec<String>,
    places: Vec<Place>,
}

/// A chunk of a content.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Place {
    chunk: Chunk,
    content: ContentId,
    /// Where it is in the content's own file, when that is whole. It is wherever the index says when it is not, and then nothing
    /// is to be written there.
    own: Option<Location>,
}

/// What has become of damage.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Doubted {
    /// What else is here had the same bytes: there is none any more.
    Mended,
    /// Somebody else is to bring what nothing here has.
    Open,
    /// The image is not here any more.
    Gone,
}

/// What images and originals have that one shares with them.
struct Others {
    /// Where whole contents, the image's own among them, have chunks.
    places: BTreeMap<Chunk, Vec<Location>>,
    /// Blobs of other originals, and whose.
    blobs: BTreeMap<[u8; 32], Chunk>,
}

impl Damage {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        self.told.is_empty()
    }

    /// Whether it is known where, so that it can be written anew.
    pub fn has_places(&self) -> bool {
        !self.places.is_empty()
    }
}

impl Store {
    /// Reads everything that an image or an original needs. Where a list is damaged, what it names is not looked at.
    pub fn verify(&self, root: &Chunk) -> Result<Damage, StoreError> {
        let mut reached = Reached::default();
        let unlisted = self.reach_listed(root, &mut reached)?;
        // The root itself may be what is damaged.
        reached.contents.entry(*root).or_insert_with(|| Content { chunks: vec![(*root, 0)] });
        let mut damage = Damage::default();
        for (id, content) in &reached.contents {
            // Lists that came by chunks are not brought together, and a root's length is not known here.
            let whole = id != root && self.index.content(id)?;
            for (chunk, at) in Location::of(content, *id) {
                let place = Place { chunk, content: *id, own: whole.then_some(at) };
                if !self.is_right(&place)? {
                    damage.told.push(format!("chunk {} of content {}", hex(&chunk), hex(id)));
                    damage.places.push(place);
                }
            }
        }
        match unlisted {
            Some(reason) if damage.is_none() => damage.told.push(reason),
            None if damage.is_none() && !reached.blobs.is_empty() => {
                damage.told = self.wrong_blobs(&self.original_at(root)?)?;
            }
            _ => {}
        }
        Ok(damage)
    }

    fn is_right(&self, place: &Place) -> Result<bool, StoreError> {
        let bytes = match &place.own {
            Some(own) => self.right_at(&place.chunk, own)?,
            None => self.chunk(&place.chunk)?,
        };
        Ok(bytes.is_some())
    }

    /// What is complete and has a damaged list, so that nobody knows what it needs.
    pub fn unlisted(&self) -> Result<Vec<Chunk>, StoreError> {
        let mut unlisted = Vec::new();
        for root in self.roots()? {
            if self.reach_listed(&root, &mut Reached::default())?.is_some() {
                unlisted.push(root);
            }
        }
        Ok(unlisted)
    }

    /// What is damaged, and still is, is written anew out of other contents that have the same bytes. What none has is not known any
    /// more: whoever brings it writes it anew. With `incomplete`, its image is to be completed again then, and until it is, or is
    /// removed, nothing is removed: nobody knows what it needs, and containers may be using it.
    pub fn doubt(&self, root: &Chunk, damage: &Damage, incomplete: bool) -> Result<Doubted, StoreError> {
        let _none_is_removed = lock(&self.removing);
        let others = self.others(root, &damage.places.iter().map(|place| place.chunk).collect())?;
        let _nobody_else = self.changing.write().unwrap_or_else(PoisonError::into_inner);
        if !self.is_complete(root)? {
            // Another has found the same, or it was given up meanwhile.
            return Ok(if self.doubted()?.contains(root) { Doubted::Open } else { Doubted::Gone });
        }
        let losses = self.losses();
        let (mut lost, mut written, mut found) = (Vec::new(), Vec::new(), Vec::new());
        for place in &damage.places {
            if self.is_right(place)? {
                continue;
            }
            let bytes = match self.chunk(&place.chunk)? {
                Some(bytes) => bytes,
                None => match self.first_right(&place.chunk, others.places.get(&place.chunk))? {
                    Some((at, bytes)) => {
                        found.push((place.chunk, at));
                        bytes
                    }
                    None => {
                        lost.push(place);
                        continue;
                    }
                },
            };
            if let Some(own) = &place.own {
                self.write_at(own, &bytes)?;
                written.push(place);
            }
        }
        let synced = if written.is_empty() { Ok(()) } else { self.sync_since(losses) };
        if synced.is_err() {
            lost.append(&mut written);
        } else if !found.is_empty() {
            self.index.point(&found)?;
        }
        if lost.is_empty() {
            return Ok(Doubted::Mended);
        }
        let contents: BTreeSet<ContentId> = lost.iter().map(|place| place.content).collect();
        contents.iter().for_each(|content| lock(&self.fresh).forget(content));
        let chunks = lost.iter().map(|place| place.chunk).collect();
        self.index.doubt(root, &Doubt { chunks, contents, incomplete, blobs: others.blobs })?;
        synced.map(|()| Doubted::Open)
    }

    fn others(&self, root: &Chunk, chunks: &BTreeSet<Chunk>) -> Result<Others, StoreError> {
        let mut reached = Reached::default();
        for other in self.roots()?.iter().filter(|other| *other != root) {
            self.reach_listed(other, &mut reached)?;
        }
        let blobs = std::mem::take(&mut reached.blobs);
        self.reach_listed(root, &mut reached)?;
        let mut places: BTreeMap<Chunk, Vec<Location>> = BTreeMap::new();
        for (id, content) in &reached.contents {
            for (chunk, at) in Location::of(content, *id).filter(|(chunk, _)| chunks.contains(chunk)) {
                if self.index.content(id)? {
                    places.entry(chunk).or_default().push(at);
                }
            }
        }
        Ok(Others { places, blobs })
    }

    /// The first of these places where the chunk is what it should be, and its bytes.
    fn first_right(
        &self,
        chunk: &Chunk,
        places: Option<&Vec<Location>>,
    ) -> Result<Option<(Location, Vec<u8>)>, StoreError> {
        for place in places.into_iter().flatten() {
            if let Some(bytes) = self.right_at(chunk, place)? {
                return Ok(Some((*place, bytes)));
            }
        }
        Ok(None)
    }

    /// What was complete, was found damaged, and is not complete again yet.
    pub fn doubted(&self) -> Result<Vec<Chunk>, StoreError> {
        self.index.doubted()
    }
}
